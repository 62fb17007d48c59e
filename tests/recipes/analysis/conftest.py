"""What a measurement must leave as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import nn


@contextmanager
def _untouched(net: nn.Module) -> Iterator[None]:
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    yield
    assert [module.training for module in net.modules()] == modes
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())  # type: ignore[arg-type]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert torch.equal(random, torch.get_rng_state())


@pytest.fixture
def untouched() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """Asserts that a network and the random state are after the block what they were before it."""
    return _untouched
