"""Where the host decides how long a step takes: small networks, where hooks, rules and calls cost more than arithmetic.

Steps of SGD and of ENGM, each run as it is, recorded (engm.record; SGD by engm.MSGD) and, the plain ones, compiled by
Inductor (backend="inductor"). All are forward and backward pass and update; those with an attack take ten steps of PGD
first. As in engm train, norms are borrowed from the attack where batch norms couple the examples. One thread.

    python benchmarks/host.py
    python benchmarks/host.py --only PGD --rounds 5
    python benchmarks/host.py --compiled PGD    # takes Inductor many minutes
    python benchmarks/host.py --draw docs/pictures/host.svg    # of what was measured last
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import output
import torch
import torch.nn.functional as F
from interleaved import Step, compare
from torch import Tensor, nn

import engm
from engm.adversarial import PGD
from engm.module import couples
from engm.recipes.models.resnet import resnet18

CLASSES = 10
CONTENDERS = ("ENGM", "SGD, recorded", "ENGM, recorded", "SGD, compiled", "ENGM, compiled")
Optimizer = Callable[[nn.Module, torch.optim.Optimizer], engm.ExampleOptimizer]


class Recurrent(nn.Module):
    """An LSTM over sequences ``[n, T, 16]``, and a linear layer on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(16, 32, batch_first=True), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    """Four encoder layers over sequences ``[n, T, 64]``, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True) for _ in range(4)]
        self.layers, self.out = nn.ModuleList(layers), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x.mean(1))


def perceptron() -> nn.Module:
    layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(64, CLASSES))


IMAGES, N = (4, 3, 8, 8), 8
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18 of width 4, batch norm": (lambda: resnet18(width=4, norm="batch"), IMAGES),
    "ResNet-18 of width 4, GroupNorm": (lambda: resnet18(width=4, norm="group"), IMAGES),
    "transformer of four layers": (Transformer, (N, 16, 64)),
    "perceptron of five layers": (perceptron, (N, 64)),
    "LSTM over 16 steps": (Recurrent, (N, 16, 16)),
}


def engm_of(model: nn.Module, sgd: torch.optim.Optimizer) -> engm.ExampleOptimizer:
    return engm.ENGM(model, sgd, 1.0)


def inner(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), 1e-6, momentum=0.9, weight_decay=5e-4)


def plain_step(net: nn.Module, x: Tensor, y: Tensor, attack: PGD | None) -> Step:
    """SGD without engm."""
    net = copy.deepcopy(net)
    sgd = inner(net)

    def step() -> None:
        inputs = x if attack is None else attack(net, x, y).inputs
        F.cross_entropy(net(inputs), y).backward()
        sgd.step()
        sgd.zero_grad()

    return step


def engm_step(
    net: nn.Module, x: Tensor, y: Tensor, attack: PGD | None, optimizer: Optimizer, backend: str | None = None
) -> Step:
    """A step of one of engm's optimizers, recorded for a backend; calibrations and comparisons are left out.

    Raises:
        RuntimeError: the step cannot be recorded, or not run by this backend.
    """
    model = engm.GradNormModule(copy.deepcopy(net), calibrate_every=10**9, check_every=10**9)
    opt = optimizer(model, inner(model))

    def losses(x: Tensor, y: Tensor) -> object:
        if attack is None:
            return F.cross_entropy(model(x), y, reduction="none")
        found = attack(model, x, y, measure=opt if couples(model) else False)
        return F.cross_entropy(model(found.inputs), y, reduction="none"), found.measurement

    program = engm.record(opt, losses, backend=backend or "replay")

    def step() -> None:
        if backend is not None:
            program(x, y)
        else:
            given = losses(x, y)
            of, measurement = given if isinstance(given, tuple) else (given, None)
            opt.backward(of, measurement=measurement)
        opt.step()
        opt.zero_grad()

    for _ in range(6):  # calibrated, recorded, and replayed
        step()
    if backend is not None and not program.report().replayed:
        raise RuntimeError(f"this step was not replayed: {program.report()}")
    return step


def draw(steps: Mapping[str, Any], path: Path) -> None:
    """Draw the ratios of all steps."""
    series = {name: [row[name]["ratio"] if name in row else None for row in steps.values()] for name in CONTENDERS}
    with output.picture(path, 1, 1, (8, 0.95 * len(steps))) as axes:
        box = axes[0, 0]
        output.bars(box, list(steps), series)
        box.set_xlabel("time of a step / SGD's by hand")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--compiled", default="plain", help="rows whose name holds this are compiled too")
    parser.add_argument("--out", type=Path, default=output.RESULTS / "host.json")
    parser.add_argument("--draw", type=Path, help="draw what --out holds into this file, and measure nothing")
    options = parser.parse_args(argv)
    if options.draw is not None:
        draw(json.loads(options.out.read_text())["steps"], options.draw)
        return
    torch.set_num_threads(options.threads)
    attack = PGD(eps=8 / 255, step_size=2 / 255, steps=10)
    rows = [(f"PGD-10, {name}", name, attack) for name in list(NETWORKS)[:2]]
    rows += [(f"plain, {name}", name, None) for name in NETWORKS]
    found = {}
    for title, name, of in rows:
        if options.only not in title:
            continue
        make, shape = NETWORKS[name]
        torch.manual_seed(0)
        net, x, y = make(), torch.rand(shape), torch.arange(shape[0]) % CLASSES
        steps = {
            "SGD": plain_step(net, x, y, of),
            "ENGM": engm_step(net, x, y, of, engm_of),
            "SGD, recorded": engm_step(net, x, y, of, engm.MSGD, "replay"),
            "ENGM, recorded": engm_step(net, x, y, of, engm_of, "replay"),
        }
        for name, optimizer in (("SGD, compiled", engm.MSGD), ("ENGM, compiled", engm_of)):
            if options.compiled in title:
                try:
                    steps[name] = engm_step(net, x, y, of, optimizer, "inductor")
                except RuntimeError as error:
                    print(f"{title}: {name}: {error}")
        timings = compare(steps, reference="SGD", rounds=options.rounds)
        found[title] = {contender: timing.as_json() for contender, timing in timings.items()}
        found[title]["both recorded"] = round(timings["ENGM, recorded"].ratio / timings["SGD, recorded"].ratio, 3)
    output.show(
        "where the host decides: time of a step / SGD's",
        ["step", "SGD, ms", *CONTENDERS, "ENGM / SGD, both recorded"],
        [
            (
                title,
                f"{row['SGD']['seconds'] * 1e3:.1f}",
                *(f"{row[name]['ratio']:.2f}" if name in row else "–" for name in CONTENDERS),
                f"{row['both recorded']:.2f}",
            )
            for title, row in found.items()
        ],
    )
    output.save(options.out, {"machine": output.machine(), "steps": found})


if __name__ == "__main__":
    main()
