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
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import output
import torch
import workloads
from interleaved import Step, compare
from torch import Tensor, nn

from engm.recipes.models.resnet import resnet18

CLASSES = 10
CONTENDERS = ("ENGM", "SGD, recorded", "ENGM, recorded", "SGD, compiled", "ENGM, compiled")


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


def sgd_step(net: nn.Module, x: Tensor, y: Tensor, attack_steps: int) -> Step:
    """SGD without engm."""
    return workloads.bare(net, x, y, attack_steps) if attack_steps else workloads.plain_sgd(net, x, y)


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
    rows = [(f"PGD-10, {name}", name, 10) for name in list(NETWORKS)[:2]]
    rows += [(f"plain, {name}", name, 0) for name in NETWORKS]
    found = {}
    for title, name, attack_steps in rows:
        if options.only not in title:
            continue
        make, shape = NETWORKS[name]
        torch.manual_seed(0)
        net, x, y = make(), torch.rand(shape), torch.arange(shape[0]) % CLASSES
        borrowed = "batch norm" in name
        ours = partial(workloads.recorded_step, net, x, y, attack_steps=attack_steps, borrowed=borrowed)
        steps = {
            "SGD": sgd_step(net, x, y, attack_steps),
            "ENGM": ours("engm", backend=None),
            "SGD, recorded": ours("msgd", backend="replay"),
            "ENGM, recorded": ours("engm", backend="replay"),
        }
        for contender, method in (("SGD, compiled", "msgd"), ("ENGM, compiled", "engm")):
            if options.compiled in title:
                try:
                    steps[contender] = ours(method, backend="inductor")
                except RuntimeError as error:
                    print(f"{title}: {contender}: {error}")
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
