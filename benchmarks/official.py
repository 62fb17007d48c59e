"""A training step of PGD, TRADES, MART, AWP and FAT beside the step of their authors' code, in one run.

The authors' steps are restated from their repositories: attack, losses, update, and nothing of logging or data. Ours
are those of ``engm train``: recorded where they can be, with momentum SGD and with ENGM, whose norms are borrowed from
the attack where the attack climbs the training loss. Networks, data and steps are the same; so are the updates of
momentum SGD but for rounding (tests/benchmarks/test_official.py).

    python benchmarks/official.py --width 16 --n 64 --rounds 9
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import official_attacks
import output
import torch
import torch.nn.functional as F
import workloads
from interleaved import Step, compare
from torch import Tensor, nn

import engm
from engm.adversarial import AWP, objective
from engm.recipes.training.trainer import Trainer

EPS, STEP_SIZE = 8 / 255, 2 / 255
BETA, GAMMA = 6.0, 5e-3
PROXY_LR = 0.01
SOURCES = {
    "PGD": "train_cifar.py of locuslab/robust_overfitting",
    "TRADES": "trades.py of yaodongyu/TRADES",
    "MART": "mart.py of YisenWang/MART",
    "AWP": "AT_AWP/train_cifar10.py and utils_awp.py of csdongxian/AWP",
    "FAT": "FAT.py and earlystop.py of zjfheart/Friendly-Adversarial-Training, tau = 1",
}
TAU = 1  # of FAT, in the middle of its schedule
OURS = {"ours, MSGD": "msgd", "ours, ENGM": "engm"}


class Official:
    """The authors' training step of one method.

    Args:
        name: one of :data:`SOURCES`.
        net: trained in place.
        steps: of the attack.
        sgd: makes the optimizer from the network.
    """

    def __init__(
        self, name: str, net: nn.Module, steps: int, sgd: Callable[[nn.Module], torch.optim.Optimizer] = workloads.sgd
    ) -> None:
        self.net, self.steps, self.optimizer = net, steps, sgd(net)
        self._take = getattr(self, f"_{name.lower()}")
        self._proxy = copy.deepcopy(net) if name == "AWP" else None
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self._take(x, y)

    def _normal(self, x: Tensor) -> Tensor:
        return 0.001 * torch.randn(x.shape, generator=self._generator, dtype=x.dtype).to(x.device)

    def _uniform(self, x: Tensor) -> Tensor:
        return (2 * torch.rand(x.shape, generator=self._generator, dtype=x.dtype).to(x.device) - 1) * EPS

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _pgd(self, x: Tensor, y: Tensor) -> None:
        x_adv = official_attacks.pgd_linf(self.net.train(), x, y, self._uniform(x), EPS, STEP_SIZE, self.steps)
        self._update(F.cross_entropy(self.net(x_adv), y))

    def _trades(self, x: Tensor, y: Tensor) -> None:
        net = self.net
        x_adv = official_attacks.trades_linf(net.eval(), x, self._normal(x), EPS, STEP_SIZE, self.steps)
        net.train()
        self.optimizer.zero_grad()
        natural = F.cross_entropy(net(x), y)
        robust = F.kl_div(F.log_softmax(net(x_adv), dim=1), F.softmax(net(x), dim=1), reduction="sum") / len(x)
        self._update(natural + BETA * robust)

    def _mart(self, x: Tensor, y: Tensor) -> None:
        net = self.net
        x_adv = official_attacks.mart_linf(net.eval(), x, y, self._normal(x), EPS, STEP_SIZE, self.steps)
        net.train()
        logits, logits_adv = net(x), net(x_adv)
        adv_probs = F.softmax(logits_adv, dim=1)
        top = torch.argsort(adv_probs, dim=1)[:, -2:]
        other = torch.where(top[:, -1] == y, top[:, -2], top[:, -1])
        loss_adv = F.cross_entropy(logits_adv, y) + F.nll_loss(torch.log(1.0001 - adv_probs + 1e-12), other)
        nat_probs = F.softmax(logits, dim=1)
        true_probs = torch.gather(nat_probs, 1, y.unsqueeze(1)).squeeze()
        kl = torch.sum(nn.KLDivLoss(reduction="none")(torch.log(adv_probs + 1e-12), nat_probs), dim=1)
        self._update(loss_adv + BETA * (kl * (1.0000001 - true_probs)).mean())

    def _awp(self, x: Tensor, y: Tensor) -> None:
        net, proxy = self.net, self._proxy
        assert proxy is not None
        x_adv = official_attacks.pgd_linf(net.train(), x, y, self._uniform(x), EPS, STEP_SIZE, self.steps)
        proxy.load_state_dict(net.state_dict())
        proxy_optimizer = torch.optim.SGD(proxy.parameters(), lr=PROXY_LR)
        (-F.cross_entropy(proxy.train()(x_adv), y)).backward()
        proxy_optimizer.step()
        proxy_optimizer.zero_grad()
        moves = {}
        for (name, old), new in zip(net.state_dict().items(), proxy.state_dict().values(), strict=True):
            if old.dim() > 1 and "weight" in name:
                difference = new - old
                moves[name] = old.norm() / (difference.norm() + 1e-20) * difference
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name in moves:
                    parameter.add_(GAMMA * moves[name])
        self._update(F.cross_entropy(net(x_adv), y))
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name in moves:
                    parameter.add_(-GAMMA * moves[name])

    def _fat(self, x: Tensor, y: Tensor) -> None:
        noise = torch.stack([self._uniform(x), *(self._normal(x) for _ in range(self.steps))])
        x_adv = official_attacks.fat_linf(self.net.eval(), x, y, noise, EPS, STEP_SIZE, TAU)
        self.net.train()
        self._update(F.cross_entropy(self.net(x_adv), y))


def ours(
    name: str,
    net: nn.Module,
    steps: int,
    method: str = "msgd",
    step: str = "auto",
    sgd: Callable[[nn.Module], torch.optim.Optimizer] = workloads.sgd,
) -> Trainer:
    """The trainer of ``engm train`` for a method of adversarial training.

    Args:
        name: one of :data:`SOURCES`.
        net: trained in place.
        steps: of the attack.
        method: the outer optimizer, ``"msgd"`` or ``"engm"``.
        step: how steps run, see :class:`Trainer`.
        sgd: makes the inner optimizer from the network.
    """
    model = engm.GradNormModule(net, calibrate_every=10**9)  # steps without a calibration are timed
    model.calibration.most_error = inf  # borrowed norms are timed whatever these images would have them judged
    opt = engm.MSGD(model, sgd(model)) if method == "msgd" else engm.ENGM(model, sgd(model), engm.alpha_for(model))
    kind = {"PGD": "pgd", "AWP": "pgd"}.get(name, name.lower())
    aim = objective(kind, beta=BETA, patience=TAU if name == "FAT" else 0, eval_mode=name not in ("PGD", "AWP"))
    trainer = Trainer(model, opt, aim.attack(EPS, STEP_SIZE, steps, "linf"), objective=aim, step=step)
    trainer.awp = AWP(model, GAMMA) if name == "AWP" else None
    return trainer


def contenders(name: str, net: nn.Module, x: Tensor, y: Tensor, steps: int) -> dict[str, Step]:
    """Steps on one batch, by the names that the table shows."""

    def taking(step: Callable[[Tensor, Tensor], Any]) -> Step:
        return lambda: step(x, y)

    found = {"official": taking(Official(name, copy.deepcopy(net).train(), steps))}
    for label, method in OURS.items():
        trainer = ours(name, copy.deepcopy(net).train(), steps, method)
        for _ in range(4):  # until the step is recorded
            trainer.step(x, y)
        found[label] = taking(trainer.step)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--only", choices=list(SOURCES), action="append", help="these methods; may be repeated")
    output.add_options(parser, "official.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    x, y = (t.to(args.device) for t in workloads.batch(args.n))
    found: dict[str, Any] = {}
    rows = []
    for name in args.only or SOURCES:
        net = workloads.network("resnet18", args.width, "batch").to(args.device)
        timings = compare(contenders(name, net, x, y, args.attack_steps), reference="official", rounds=args.rounds)
        found[name] = {label: timing.as_json() for label, timing in timings.items()} | {"source": SOURCES[name]}
        ratios = [f"{timings[label].ratio:.2f} ± {timings[label].spread:.2f}" for label in OURS]
        engm_over_msgd = timings["ours, ENGM"].seconds / timings["ours, MSGD"].seconds
        rows.append([name, f"{timings['official'].seconds:.3f}", *ratios, f"{engm_over_msgd:.2f}"])
        print(f"{name}: done", flush=True)
    title = f"time of a step over the official one's, ResNet-18 of width {args.width}, n = {args.n}, batch norm"
    output.show(title, ["", "official, s", *OURS, "ENGM / MSGD"], rows)
    output.save(
        args.out, {"arguments": output.arguments(args), "machine": output.machine(args.device), "methods": found}
    )


if __name__ == "__main__":
    main()
