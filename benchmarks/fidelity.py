"""How well each way of taking norms under training-mode batch norm reproduces the paper's weights and update.

Trains a batch-norm network adversarially with ENGM, its norms borrowed from the attack's last step, and at a few steps
computes every example's exact gradient, one backpropagation each. Against those it reports, for every way of taking
norms (a "mode"), the correlation of the norms, the mean relative error of ``w_i`` and the cosine of ``sum_i w_i g_i``
with the exact one; alpha is the median of the exact norms, so that half of the examples are clipped.

The rows "default" use the engine as a user gets it: factors up to ``calibrate_every`` steps old. All other fitted rows
are fitted on the 16 examples of a fresh draw from the very batch; those that name a number of examples are means over
20 draws of so many, to tell how many a calibration needs.

    python benchmarks/fidelity.py --out benchmarks/results/cpu/fidelity_digits.json --eps 0.2 --attack-steps 10
    python benchmarks/fidelity.py --data CIFAR10.npz --out benchmarks/results/cpu/fidelity_cifar10.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import output
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engm
from engm.backward.collect import TermCollector
from engm.backward.norms import calibrated_squared_norms, measure_graph
from engm.backward.prepare import planned_losses
from engm.exact import exact_squared_norms
from engm.recipes.models.resnet import NormName, resnet18, small_resnet


def load(name: str) -> tuple[Tensor, Tensor]:
    """Training images ``[N, C, H, W]`` in [0, 1] and labels ``[N]``: scikit-learn's digits, or an ``.npz``."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target).long()
    archive = np.load(name)
    images = torch.tensor(archive["x_train"][:8000]).permute(0, 3, 1, 2).float() / 255
    return images, torch.tensor(archive["y_train"][:8000]).long()


def network(args: argparse.Namespace, channels: int, norm: NormName = "batch") -> nn.Module:
    """The small ResNet for digits, ResNet-18 for anything else."""
    make = small_resnet if args.data == "digits" else resnet18
    return make(width=args.width, in_channels=channels, norm=norm)


def batches_of(count: int, n: int, generator: torch.Generator) -> list[Tensor]:
    """Indices of whole batches of ``n`` in a drawn order."""
    order = torch.randperm(count, generator=generator)
    return [order[i : i + n] for i in range(0, count - n + 1, n)]


def inner_sgd(model: nn.Module, args: argparse.Namespace) -> torch.optim.SGD:
    """The optimizer of the run."""
    return torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)


def attack(
    model: engm.GradNormModule, x: Tensor, y: Tensor, args: argparse.Namespace
) -> tuple[Tensor, engm.Measurement]:
    """PGD with random start; the last step measures. Returns the adversarial examples and the measurement.

    ``args.statistics`` is the network's mode during the attack: "evaluation" or "training".
    """
    delta = (torch.rand_like(x) * 2 - 1) * args.eps
    model.train(args.statistics == "training")
    for step in range(args.attack_steps):
        at = (x + delta).clamp(0, 1).requires_grad_()
        if step == args.attack_steps - 1:
            measured = engm.measure(model, F.cross_entropy(model(at), y, reduction="none"), at)
            gradient = measured.input_grads
        else:
            with model.paused():
                loss = F.cross_entropy(model(at), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, at)
        delta = (delta + args.eps / 4 * gradient.sign()).clamp(-args.eps, args.eps)
    model.train()
    return (x + delta).clamp(0, 1).detach(), measured


def exact_gradients(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """``[n, P]``, every example's gradient through the batch's statistics."""
    rows = []
    for loss in losses.unbind():
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]))
    return torch.stack(rows)


class Judge:
    """Compares predicted norms with exact ones for one batch."""

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients
        self.norms = gradients.norm(dim=1)
        self.alpha = self.norms.median()
        self.weights = (self.alpha / self.norms).clamp(max=1)
        self.update = self.weights @ gradients

    def __call__(self, norms: Tensor) -> dict[str, float]:
        weights = (self.alpha / norms.clamp_min(1e-30)).clamp(max=1)
        return {
            "correlation": float(torch.corrcoef(torch.stack([norms, self.norms]))[0, 1]),
            "weight_error": float(((weights - self.weights).abs() / self.weights).mean()),
            "cosine": float(F.cosine_similarity(weights @ self.gradients, self.update, dim=0)),
        }


def one_scale(norms: Tensor, exact: Tensor, fit: Tensor) -> Tensor:
    """The norms times the factor that fits them to the exact ones on the examples ``fit``."""
    return norms * ((norms[fit] * exact[fit]).sum() / norms[fit].square().sum())


def a_line(x: Tensor, y: Tensor, fit: Tensor) -> Tensor:
    """The line through ``(x, y)`` fitted on the examples ``fit``, at all ``x``."""
    dx, dy = x[fit] - x[fit].mean(), y[fit] - y[fit].mean()
    slope = (dx * dy).sum() / dx.square().sum()
    return y[fit].mean() + slope * (x - x[fit].mean())


def per_tensor(stacked: Tensor, exact: Tensor, fit: Tensor, *, relative: bool = True) -> Tensor:
    """Norms after one factor per parameter tensor, fitted on the examples ``fit``; ``relative``: each counts alike."""
    share = 1 / exact[:, fit].sum(0) if relative else torch.ones(len(fit))
    measured = (stacked[:, fit] * share).sum(1)
    factors = torch.where(measured > 0, (exact[:, fit] * share).sum(1) / measured, torch.ones_like(measured))
    return (stacked * factors[:, None]).sum(0).sqrt()


def by_number_of_examples(judge: Judge, name: str, stacked: Tensor, exact: Tensor) -> dict[str, dict[str, float]]:
    """What norms after one factor per tensor are worth, by the number of examples that the factors are fitted on."""
    generator = torch.Generator().manual_seed(0)
    n, found = stacked.shape[1], {}
    for count in (4, 8, 16, n):
        draws = [torch.randperm(n, generator=generator)[:count] for _ in range(20 if count < n else 1)]
        judged = [judge(per_tensor(stacked, exact, draw)) for draw in draws]
        found[f"{name}, per tensor, on {'all' if count == n else count}"] = {
            key: float(np.mean([values[key] for values in judged])) for key in judged[0]
        }
    return found


def judge_own(own: engm.GradNormModule, x: Tensor, y: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Every mode with a norm pass of its own on one batch; ``own`` carries the calibration of such a run."""
    parameters = [p for _, p in own.trainable_parameters()]
    x = x.clone().requires_grad_()
    losses = F.cross_entropy(own(x), y, reduction="none")
    graph = planned_losses(own, losses)
    judge = Judge(exact_gradients(losses, parameters))
    exact = exact_squared_norms(losses, parameters)
    fit = torch.randperm(len(y), generator=generator)[:16]
    naive = TermCollector(graph)
    naive.run(losses, torch.ones_like(losses), frozen=False, retain_graph=True)
    frozen = measure_graph(graph, losses, "frozen").stacked
    corrected = measure_graph(graph, losses, "corrected")
    (gradient,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    own.eval()
    evaluation = engm.measure(own, F.cross_entropy(own(x.detach()), y, reduction="none")).norms
    own.train()
    stacked, factors = calibrated_squared_norms(own, graph, losses, corrected, borrowed=False, count=False)
    norms = {
        "backprops of the summed loss (naive hooks)": naive.squared_norms(losses).sum(0).sqrt(),
        "input-gradient norm, fitted": a_line(gradient.flatten(1).norm(dim=1), judge.norms, fit),
        "evaluation-mode statistics, fitted": a_line(evaluation, judge.norms, fit),
        "frozen, raw": frozen.sum(0).sqrt(),
        "frozen, one scale": one_scale(frozen.sum(0).sqrt(), judge.norms, fit),
        "frozen, per tensor, plain sums": per_tensor(frozen, exact, fit, relative=False),
        "frozen, per tensor": per_tensor(frozen, exact, fit),
        "frozen + local correction, raw": corrected.stacked.sum(0).sqrt(),
        "frozen + local correction, per tensor, plain sums": per_tensor(corrected.stacked, exact, fit, relative=False),
        "frozen + local correction, per tensor": per_tensor(corrected.stacked, exact, fit),
        "default, own pass": (stacked * factors[:, None]).sum(0).sqrt(),
    }
    return {
        "mean_exact_norm": float(judge.norms.mean()),
        "sgd_cosine": float(F.cosine_similarity(judge.gradients.sum(0), judge.update, dim=0)),
        "modes": {name: judge(value) for name, value in norms.items()}
        | by_number_of_examples(judge, "frozen + local correction", corrected.stacked, exact),
    }


def judge_borrowed(
    model: engm.GradNormModule, x: Tensor, y: Tensor, measured: engm.Measurement, generator: torch.Generator
) -> dict[str, Any]:
    """Norms from the last step of the attack that made ``x``; ``model`` carries the calibration of the run."""
    parameters = [p for _, p in model.trainable_parameters()]
    losses = F.cross_entropy(model(x), y, reduction="none")
    judge = Judge(exact_gradients(losses, parameters))
    exact = exact_squared_norms(losses, parameters)
    fit = torch.randperm(len(y), generator=generator)[:16]
    stacked, factors = calibrated_squared_norms(
        model, planned_losses(model, losses), losses, measured, borrowed=True, count=False
    )
    return {
        "borrowed, per tensor": judge(per_tensor(measured.stacked, exact, fit)),
        "default, borrowed": judge((stacked * factors[:, None]).sum(0).sqrt()),
        **by_number_of_examples(judge, "borrowed", measured.stacked, exact),
    }


def calibrate(model: engm.GradNormModule, x: Tensor, y: Tensor) -> None:
    """Takes fresh factors for the norm pass of ``model``, as a run with such a pass does when they are due."""
    losses = F.cross_entropy(model(x), y, reduction="none")
    graph = planned_losses(model, losses)
    model.calibration.forget()
    measured = measure_graph(graph, losses, "corrected")
    calibrated_squared_norms(model, graph, losses, measured, borrowed=False, count=False)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, judges at the steps ``args.at``, and returns what the JSON holds."""
    torch.manual_seed(args.seed)
    images, labels = load(args.data)
    net = network(args, images.shape[1])
    model = engm.GradNormModule(net)  # this wrapper trains, with norms borrowed from the attack
    own = engm.GradNormModule(net)  # this one is calibrated as in a run with a norm pass of its own
    opt = engm.ENGM(model, inner_sgd(model, args), alpha=args.alpha)
    generator = torch.Generator().manual_seed(args.seed)
    batches = batches_of(len(labels), args.batch, generator)
    records = []
    for step in range(args.steps + 1):
        chosen = batches[step % len(batches)]
        x, y = images[chosen], labels[chosen]
        x_adv, measured = attack(model, x, y, args)
        draws = model.calibration.sample.draws
        losses = F.cross_entropy(model(x_adv), y, reduction="none")
        opt.backward(losses, measurement=measured)
        keep = {k: v.clone() for k, v in net.state_dict().items()}
        if model.calibration.sample.draws > draws:  # a run with its own pass would calibrate at the same steps
            calibrate(own, x_adv, y)
        if step in args.at:
            record = {"step": step, "loss": losses.mean().item(), **judge_own(own, x_adv, y, generator)}
            record["modes"] |= judge_borrowed(model, x_adv, y, measured, generator)
            records.append(record)
            print(
                f"step {step}: mean exact norm {record['mean_exact_norm']:.2f}, loss {record['loss']:.3f}", flush=True
            )
            for name, values in record["modes"].items():
                print(
                    "   {:50s} corr {correlation:.3f}  err {weight_error:6.2%}  cos {cosine:.4f}".format(
                        name, **values
                    ),
                    flush=True,
                )
        net.load_state_dict(keep)  # what was run on the side leaves no trace in the running statistics
        opt.step()
        opt.zero_grad()
    return {
        "arguments": {key: value for key, value in vars(args).items() if key != "out"},
        "machine": output.machine(),
        "records": records,
    }


def table(result: dict[str, Any]) -> str:
    """A Markdown table: for every mode the range of the correlation, and means and worst values of error and cosine."""
    lines = ["| norms from | correlation | error of w_i (worst) | cosine of the update (worst) |", "|---|---|---|---|"]
    for name in result["records"][0]["modes"]:
        rows = [record["modes"][name] for record in result["records"]]
        c, e, s = ([row[key] for row in rows] for key in ("correlation", "weight_error", "cosine"))
        figures = f"{min(c):.2f}–{max(c):.2f} | {np.mean(e):.1%} ({max(e):.1%}) | {np.mean(s):.4f} ({min(s):.4f})"
        lines.append(f"| {name} | {figures} |")
    return "\n".join(lines)


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of an adversarial run that is looked at now and then."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, or an .npz with x_train and y_train")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=299)
    parser.add_argument("--at", type=int, nargs="*", default=[20, 75, 130, 185, 240, 299])
    parser.add_argument("--attack-steps", type=int, default=5)
    parser.add_argument("--alpha", type=float, default=5.0, help="what the run trains with; half of an early mean norm")
    parser.add_argument("--eps", type=float, default=8 / 255)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    return parser


def main() -> None:
    """Command line."""
    parser = options(__doc__)
    parser.add_argument("--statistics", choices=["evaluation", "training"], default="training")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = run(args)
    print(table(result))
    if args.out:
        output.save(args.out, result)


if __name__ == "__main__":
    main()
