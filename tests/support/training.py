"""A little classifier, its batches and losses, and snapshots of everything that a step may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from oracle import per_example_gradients, trained
from torch import Tensor, nn

import engm
from engm.backward import collect

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(2, channels),
    "none": lambda channels: nn.Identity(),
}


def network(norm: str = "group", seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A small convolutional classifier, ``[n, 3, 6, 6] -> [n, 5]``, with no parameter at a special value."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        NORMS[norm](4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        NORMS[norm](6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return net.to(dtype)


def batch(n: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs ``[n, 3, 6, 6]`` of uneven size, so that the norms spread, and labels ``[n]``."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(n, 3, 6, 6, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.2, 2.0, n, dtype=torch.float64).view(n, 1, 1, 1)
    return x.to(dtype), torch.randint(0, 5, (n,), generator=generator)


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, **options})


def clip(norms: Tensor, alpha: float) -> Tensor:
    """The weights of Eq. 5b."""
    return torch.where(norms > alpha, alpha / norms, torch.ones_like(norms))


def grads(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters() if p.requires_grad]


def median_norm(model: engm.GradNormModule, x: Tensor, y: Tensor) -> float:
    """An ``alpha`` that clips about half of the batch; leaves buffers and graphs alone."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with model.paused():
        norms = per_example_gradients(losses_of(model, x, y), trained(model)).norms
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return float(norms.median()) * 1.01


def snapshot(opt: engm.ExampleOptimizer) -> dict[str, Any]:
    """Copies of everything that a failed call must leave alone."""
    model = opt.model
    return clone(
        {
            "parameters": dict(model.named_parameters()),
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "buffers": dict(model.named_buffers()),
            "state": opt.state_dict(),
            "random": torch.get_rng_state(),
            "stats": None if opt.stats is None else vars(opt.stats),
        }
    )


def clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: clone(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [clone(entry) for entry in value]
    return value


def assert_same(found: Any, expected: Any, where: str = "value") -> None:
    """Bitwise, however deep; NaN equals NaN."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor), where
        assert found.dtype == expected.dtype, where
        assert torch.equal(found.nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0)), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, entry in expected.items():
            assert_same(found[key], entry, f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for position, entry in enumerate(expected):
            assert_same(found[position], entry, f"{where}[{position}]")
    else:
        assert found == expected or (found != found and expected != expected), where


def assert_close(found: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Equal but for rounding in float64, which is what the engine promises against the oracle."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@contextmanager
def backward_passes() -> Iterator[list[str]]:
    """Collects the name of every backward pass that autograd is asked for: ``"grad"`` or ``"backward"``."""
    passes: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            passes.append(name)
            return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(torch.autograd, "grad", counted("grad", torch.autograd.grad)),
        mock.patch.object(collect, "gradients_of", counted("grad", collect.gradients_of)),
        mock.patch.object(torch.autograd, "backward", counted("backward", torch.autograd.backward)),
    ):
        yield passes
