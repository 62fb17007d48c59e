"""What a random training loop is made of: a network, graphs that wait for a backward pass, and what these come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from engine_checks import TOLERANCE
from oracle import Truth, per_example_gradients, trained
from torch import Tensor, nn

import engm

NORMS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "layer": lambda: nn.LayerNorm(4),
    "group": lambda: nn.GroupNorm(2, 4),
    "batch": lambda: nn.BatchNorm1d(4),
}


class Network(nn.Module):
    """A layer called twice, an in-place operation, a residual and a layer that can be skipped."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = NORMS[norm]()
        self.middle = nn.Linear(4, 4, bias=False)
        self.last = nn.Linear(4, 2)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.norm(self.first(x))) + 0.1
        if not self.skip:
            h = h + torch.tanh(self.middle(torch.tanh(self.middle(h))))
        return self.last(h)


@dataclass
class Graph:
    """Losses that wait for a backward pass.

    Attributes:
        losses: ``[n]``.
        model: the wrapper that computed them.
        captured: whether its own forward pass did.
        intact: nothing was done that could make torch refuse to backpropagate.
        truth_before: the truth, while the graph was there.
    """

    losses: Tensor
    model: engm.GradNormModule
    captured: bool = True
    intact: bool = True
    truth_before: Truth = field(default_factory=lambda: Truth({}))

    def truth(self) -> Truth:
        """What plain torch makes of the graph now."""
        if not any(p.requires_grad for p in self.model.parameters()):
            raise RuntimeError("nothing is trained")
        return per_example_gradients(self.losses, trained(self.model.unwrap()))


class Interrupted:
    """Raises at the ``count``-th call."""

    def __init__(self, exception: type[BaseException], count: int = 1) -> None:
        self.exception, self.left = exception, count

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.exception("on purpose")


class AddedGradients:
    """What comes to the gradients of a network from now on."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.old = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}

    def now(self) -> Tensor:
        parts = []
        for name, parameter in trained(self.net).items():
            new = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            old = self.old[name]
            parts.append((new if old is None else new - old).flatten())
        return torch.cat(parts)


def optimizer_of(model: engm.GradNormModule) -> engm.ENGM:
    return engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=1.0)


def clip_weights(expected: Truth) -> Tensor:
    return (1 / expected.norms).clamp(max=1)


def clipped_mean(expected: Truth) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in expected.update(clip_weights(expected)).values()])


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    error, scale = float((found - wanted).detach().norm()), float(wanted.detach().norm())
    assert error <= TOLERANCE["gradient, float64"] * scale + 1e-12
