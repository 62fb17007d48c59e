"""Walks over the modules and parameters of a network, in torch's order and under torch's names.

``Module.named_modules`` and ``named_parameters`` are generators within generators, one for every level of nesting, and
a step needs several walks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from ..rules import registrations
from ..torch_internals import COMPUTING, own_children, own_parameters, trained_of
from .held import ANY_LENGTH, Held

Found = TypeVar("Found")
OtherFound = TypeVar("OtherFound")


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
    """Names and tensors of the parameters of ``net`` that require grad, every tensor once, in torch's order.

    What somebody computed from other tensors and put among the parameters is none.
    """
    seen: set[nn.Parameter] = set()
    found = []
    for name, module in named_modules(net):
        for key, parameter in trained_of(module).items():
            if parameter not in seen and parameter.is_leaf:
                seen.add(parameter)
                found.append((f"{name}.{key}" if name else key, parameter))
    return found


class Walks:
    """What walks over a network found, remembered for as long as the network consists of the same.

    Args:
        net: the network.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._held: Held | None = None
        self._methods: list[tuple[type, str]] = []  # by which the types of the modules compute their output
        self._computing: list[Any] = []  # what these were
        self._rules = 0
        self._found: dict[Callable[[nn.Module], Any], Any] = {}

    def found(self, walk: Callable[[nn.Module], Found]) -> Found:
        """What ``walk(net)`` finds; see :meth:`found_by_both`."""
        return self._by_each((walk,))[0]

    def found_by_both(
        self, walk: Callable[[nn.Module], Found], other: Callable[[nn.Module], OtherFound]
    ) -> tuple[Found, OtherFound]:
        """What ``walk(net)`` and ``other(net)`` find; the network is looked at once to see that it is the same.

        Args:
            walk: may depend on what modules consist of: types, children, parameters, which of these are trained, and
                the rules that there are; not on modes, nor on the numbers in tensors.
            other: as ``walk``.
        """
        first, second = self._by_each((walk, other))
        return first, second

    def _by_each(self, walks: Sequence[Callable[[nn.Module], Any]]) -> list[Any]:
        known = self._held is not None and self._rules == registrations() and self._held.same()
        # Anybody may replace a method on a type.
        if not (known and self._computing == [getattr(kind, method, None) for kind, method in self._methods]):
            self._rules = registrations()
            modules = [module for _, module in named_modules(self._net)]
            kinds = list(dict.fromkeys(map(type, modules)))
            self._held = _parts_of(modules)
            self._methods = [(kind, method) for kind in kinds for method in COMPUTING if hasattr(kind, method)]
            self._computing = [getattr(kind, method) for kind, method in self._methods]
            self._found.clear()
        for walk in walks:
            if walk not in self._found:
                self._found[walk] = walk(self._net)
        return [self._found[walk] for walk in walks]


def _parts_of(modules: Sequence[nn.Module]) -> Held:
    """What modules consist of."""
    parts = [part for module in modules for part in (own_children(module), own_parameters(module))]
    parameters = [p for module in modules for p in own_parameters(module).values() if p is not None]
    return Held(modules, parts, [(vars(module), ANY_LENGTH, COMPUTING) for module in modules], parameters)


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
