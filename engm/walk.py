"""Walks over the modules and parameters of a network, in torch's order and under torch's names.

``Module.named_modules`` and ``named_parameters`` are generators within generators, one for every level of nesting, and
a step needs several walks.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def named_modules(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``net.named_modules()``: every module once, parents before their children."""
    seen: set[nn.Module] = set()
    stack = [("", net)]
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        prefix = f"{name}." if name else ""
        stack += [(prefix + key, child) for key, child in reversed(module._modules.items()) if child is not None]


def trained_parameters(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Those of ``net.named_parameters()`` that require grad, every tensor once."""
    seen: set[nn.Parameter] = set()
    found = []
    for name, module in named_modules(net):
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                found.append((f"{name}.{key}" if name else key, parameter))
    return found
