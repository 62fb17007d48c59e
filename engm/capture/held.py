"""What dictionaries, types and tensors were, to be compared with what they are by one look."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .._C import facts_of, same_items, same_types

ANY_LENGTH = -1
MISSING = NotImplemented  # in the place of a value that is not there


class Held:
    """Who was where: objects by their types, dictionaries by their values, tensors by all but their numbers.

    Values count as the same if they are the same object, so what can be changed from within has to be looked at by
    other means.

    Args:
        objects: whose types count.
        whole: dictionaries all of whose values count; what is none (of a scripted module) is never the same.
        parts: dictionaries of which some values count, the length that they have (:data:`ANY_LENGTH`: which does not
            count) and the keys.
        tensors: whose shapes, strides, types, devices and memory count, and whether they require grad.

    Attributes:
        facts: all that counts of the tensors; equal where they are alike in that.
    """

    def __init__(
        self,
        objects: Sequence[Any],
        whole: Iterable[Mapping[Any, Any]],
        parts: Iterable[tuple[Mapping[Any, Any], int, tuple[Any, ...]]],
        tensors: Sequence[Tensor],
    ) -> None:
        self._objects = list(objects)
        self._types = tuple([type(thing) for thing in objects])
        every = [(held, len(held), tuple(held) if isinstance(held, dict) else ()) for held in whole]
        self._items = tuple(
            [
                (held, length, keys, tuple([held.get(key, MISSING) for key in keys]))
                for held, length, keys in (*every, *parts)
            ]
        )
        self._tensors = list(tensors)
        self.facts = facts_of(self._tensors)

    def same(self) -> bool:
        """Whether everything is as it was."""
        return (
            same_types(self._objects, self._types) and same_items(self._items) and facts_of(self._tensors) == self.facts
        )
