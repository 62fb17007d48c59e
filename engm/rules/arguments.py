"""The arguments of a call, taken apart into tensors and the rest, and put together again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from enum import Enum
from functools import cached_property, lru_cache
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_internals import TreeSpec, tree_flatten, tree_unflatten

# Types whose values are kept as they are: None, numbers and text, what torch takes for options, and code.
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.Generator),
    *(type, FunctionType, BuiltinFunctionType, nn.Module),
)
_LEAVES = (Tensor, type(None), bool, int, float, str)  # what most arguments are, none of them a nest


class Arguments:
    """What a module was called with.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs

    @cached_property
    def flattened(self) -> tuple[list[Any], TreeSpec]:
        """The leaves of ``(args, kwargs)``, and how they were nested."""
        leaves = [*self.args, *self.kwargs.values()]
        if type(self.args) is tuple and type(self.kwargs) is dict and all(isinstance(leaf, _LEAVES) for leaf in leaves):
            return leaves, _not_nested(len(self.args), tuple(self.kwargs))
        return tree_flatten((self.args, self.kwargs))

    def get(self, position: int, name: str) -> Any:
        """The argument at ``position``, or under ``name`` if it was given as a keyword; None without one."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)


@lru_cache(256)
def _not_nested(count: int, names: tuple[str, ...]) -> TreeSpec:
    """How arguments are nested that are none: torch takes longer to find out than a small layer to compute."""
    return tree_flatten(((0,) * count, dict.fromkeys(names, 0)))[1]


class Frame:
    """Arguments without their tensors: nests of tuples, lists, dicts, named tuples and packed sequences.

    An object that is neither a tensor nor a plain value (a cache that the network fills, say) is held weakly. Such an
    object may lead back to the graph that holds the frame, and circles through autograd's nodes are never freed.

    Args:
        leaves: the leaves of the flattened arguments, tensors included.
        spec: how the leaves were nested.
    """

    def __init__(self, leaves: Sequence[Any], spec: TreeSpec) -> None:
        self._spec = spec
        self._others = [None if isinstance(leaf, Tensor) else _held(leaf) for leaf in leaves]
        self._places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    @classmethod
    def split(cls, arguments: Arguments) -> tuple[Frame, tuple[Tensor, ...]]:
        """The frame, and the tensors in the order that :meth:`filled` wants them in."""
        leaves, spec = arguments.flattened
        return cls(leaves, spec), tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def filled(self, tensors: Sequence[Tensor]) -> Arguments:
        """The arguments, with these tensors in place of the original ones.

        Raises:
            ReferenceError: an object among the arguments does not exist any more, or cannot be held weakly.
        """
        leaves = [other.get() if isinstance(other, _Weakly) else other for other in self._others]
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        return Arguments(args, kwargs)


class _Weakly:
    """A reference to an object that does not keep the object alive."""

    def __init__(self, value: Any) -> None:
        self._kind = type(value).__name__
        try:
            self._reference: weakref.ref[Any] | None = weakref.ref(value)
        except TypeError:  # there are no weak references to such an object
            self._reference = None

    def get(self) -> Any:
        if self._reference is None:
            raise ReferenceError(f"its argument of type {self._kind} cannot be kept")
        value = self._reference()
        if value is None:
            raise ReferenceError(f"its argument of type {self._kind} does not exist any more")
        return value


def _held(value: Any) -> Any:
    return value if isinstance(value, _PLAIN) else _Weakly(value)
