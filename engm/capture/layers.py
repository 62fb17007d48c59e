"""Walks over the modules and parameters of a network, in torch's order and under torch's names.

``Module.named_modules`` and ``named_parameters`` are generators within generators, one for every level of nesting, and
a step needs several walks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..torch_internals import own_children, trained_of


def named_modules(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules as ``net.named_modules()`` gives them: every module once, parents before their children."""
    seen: set[nn.Module] = set()
    stack = [("", net)]
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        prefix = f"{name}." if name else ""
        stack += [
            (prefix + key, child) for key, child in reversed(tuple(own_children(module).items())) if child is not None
        ]


def trained_parameters(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and tensors of the parameters of ``net`` that require grad, every tensor once, in torch's order."""
    seen: set[nn.Parameter] = set()
    found = []
    for name, module in named_modules(net):
        for key, parameter in trained_of(module).items():
            if parameter not in seen:
                seen.add(parameter)
                found.append((f"{name}.{key}" if name else key, parameter))
    return found


@contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """Restores the network's buffers and the random state when the context ends."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in net.buffers()]
    devices = sorted({p.device.index for p in net.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
