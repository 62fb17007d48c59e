"""What hostile tests look at: everything on a network that is not ours to change, and what a call came to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
REFUSALS = (RuntimeError, ValueError, TypeError)  # what a clear error may be


def hooks_of(net: nn.Module) -> list[tuple[str, list[str], list[int]]]:
    """Names of what lies on every module, and how many hooks of each kind."""
    return [
        (name, sorted(vars(module)), [len(vars(module)[kind]) for kind in HOOKS])
        for name, module in net.named_modules()
    ]


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Copies of parameters, gradients, buffers, modes, hooks and the optimizer's state."""
    return {
        "parameters": {name: p.detach().clone() for name, p in net.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()},
        "buffers": {name: b.clone() for name, b in net.named_buffers()},
        "trained": [p.requires_grad for p in net.parameters()],
        "modes": [module.training for module in net.modules()],
        "hooks": hooks_of(net),
        "optimizer": None if optimizer is None else copy.deepcopy(optimizer.state_dict()),
    }


def assert_same(found: Any, expected: Any) -> None:
    """Equal to the bit, through dicts, sequences and the words of an error; NaN equals NaN."""
    assert type(found) is type(expected)
    if isinstance(found, Tensor):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(found, dict):
        assert list(found) == list(expected)
        assert_same(list(found.values()), list(expected.values()))
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(found, Exception):
        assert str(found) == str(expected)
    else:
        assert found == expected


def outcome(function: Callable[..., Any], *args: Any) -> Any:
    """What a call returns, or the error that it refuses with."""
    try:
        return function(*args)
    except REFUSALS as error:
        return error
