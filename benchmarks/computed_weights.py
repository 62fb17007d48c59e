"""Layers whose weight is computed from parameters: time of ENGM's step as a ratio to SGD's, beside plain layers.

A weight norm, a spectral norm, a low-rank update merged into the weight, a mask, a normalised classifier, an orthogonal
map. Per-example gradients of such a weight have to be pulled back to its parameters: in factors where the operators
allow it (:mod:`engm.rules.in_factors`), else by autograd, all examples at once where that can be.

    python benchmarks/computed_weights.py --rounds 7
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import output
import torch
import torch.nn.functional as F
from interleaved import compare
from routed import loss, training_steps
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

Wrap = Callable[[nn.Module], nn.Module]


class LowRank(nn.Module):
    """A frozen weight ``[d, *]`` and a trained update of rank four, scaled to lengths of their own if that is asked."""

    def __init__(self, weight: Tensor, lengths: bool) -> None:
        super().__init__()
        d, p = weight.flatten(1).shape
        self.a, self.b = nn.Parameter(0.1 * torch.randn(4, p)), nn.Parameter(0.1 * torch.randn(d, 4))
        self.lengths = nn.Parameter(weight.flatten(1).norm(dim=1, keepdim=True)) if lengths else None

    def forward(self, weight: Tensor) -> Tensor:
        merged = weight.flatten(1) + self.b @ self.a
        if self.lengths is not None:
            merged = self.lengths * merged / merged.norm(dim=1, keepdim=True)
        return merged.view_as(weight)


class Direction(nn.Module):
    """Rows of length one, as of a cosine classifier."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.normalize(weight.flatten(1), dim=1).view_as(weight)


class Rounded(torch.autograd.Function):
    """Sixteen values; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        step = weight.abs().max() / 7.5
        return (weight / step).round() * step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Computed(nn.Module):
    """A weight that a function makes of the parameter."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, weight: Tensor) -> Tensor:
        return self.function(weight)


def computed_by(function: Callable[[Tensor], Tensor]) -> Wrap:
    """What gives a layer a weight that a function makes."""
    return lambda layer: parametrize.register_parametrization(layer, "weight", Computed(function))


def low_rank(layer: nn.Module, lengths: bool = False) -> nn.Module:
    layer.weight.requires_grad_(False)
    return parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, lengths), unsafe=True)


KINDS: dict[str, Wrap] = {
    "plain": lambda layer: layer,
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "normalised rows": lambda layer: parametrize.register_parametrization(layer, "weight", Direction()),
    "mask": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "LoRA, merged": low_rank,
    "DoRA, merged": lambda layer: low_rank(layer, lengths=True),
    "distribution in rows": computed_by(lambda weight: weight.softmax(1)),
    "rounded, straight through": computed_by(Rounded.apply),
    "rotation, by exponential": partial(parametrizations.orthogonal, orthogonal_map="matrix_exp"),
    "rotation, by Cayley's map": partial(parametrizations.orthogonal, orthogonal_map="cayley"),
    "rotation, by reflections": partial(parametrizations.orthogonal, orthogonal_map="householder"),
}
OF_MATRICES = [kind for kind in KINDS if kind.startswith(("LoRA", "DoRA", "distribution", "rotation"))]


def perceptron(wrap: Wrap) -> tuple[nn.Module, Tensor]:
    layers = [wrap(nn.Linear(128, 256)), nn.ReLU(), wrap(nn.Linear(256, 256)), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers), torch.randn(64, 128)


def convolutional(wrap: Wrap) -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for before, width, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
        layers += [wrap(nn.Conv2d(before, width, 3, stride, 1)), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)), torch.randn(32, 3, 16, 16)


def transformer(wrap: Wrap) -> tuple[nn.Module, Tensor]:
    blocks = [nn.TransformerEncoderLayer(64, 4, 256, 0.0, batch_first=True) for _ in range(2)]
    for block in blocks:
        block.linear1, block.linear2 = wrap(block.linear1), wrap(block.linear2)
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32 * 64, 10)), torch.randn(16, 32, 64)


NETWORKS = {
    "perceptron, n = 64": perceptron,
    "convolutions, n = 32": convolutional,
    "transformer, n = 16, 32 tokens": transformer,
}


def measured(network: Callable[[Wrap], tuple[nn.Module, Tensor]], wrap: Wrap, rounds: int) -> dict[str, float]:
    net, x = network(wrap)
    return compare(training_steps(net, lambda m: loss(m(x))), reference="SGD", rounds=rounds)["ENGM"].as_json()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=output.RESULTS / "computed_weights.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # Of kernels some are rare.
    found = {
        kind: {
            name: measured(network, wrap, options.rounds)
            for name, network in NETWORKS.items()
            if network is not convolutional or kind not in OF_MATRICES
        }
        for kind, wrap in KINDS.items()
    }
    rows = [
        (kind, *(f"{row[name]['ratio']:.2f} ± {row[name]['spread']:.2f}" if name in row else "" for name in NETWORKS))
        for kind, row in found.items()
    ]
    output.show("ENGM / SGD where weights are computed", ["weight", *NETWORKS], rows)
    output.save(options.out, {"machine": output.machine(), "ratios": found})


if __name__ == "__main__":
    main()
