"""A CUDA graph's double on the CPU: what is replayed runs again, on the very memory that it was captured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from engm.torch_internals import Operators, schema_of, tensors_in


class OnMemory(Operators):
    """Runs operators such that the results of each are where they were the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[list[Tensor]] = []
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(part.alias_info is not None for part in schema_of(func).returns):
            return result  # a view, or what was written into: memory that is known
        found = tensors_in(result)
        if self.number == len(self.places):
            self.places.append([tensor.detach() for tensor in found])  # whose sizes no later operator changes in place
        places = self.places[self.number]
        self.number += 1
        for place, tensor in zip(places, found, strict=True):
            if place.data_ptr() != tensor.data_ptr():
                place.copy_(tensor)
        remaining = (place.detach() for place in places)
        if isinstance(result, Tensor):
            return next(remaining)
        return type(result)(next(remaining) if isinstance(part, Tensor) else part for part in result)

    def spoil(self) -> None:
        """Overwrite everything that was computed."""
        for tensor in (tensor for place in self.places for tensor in place):
            tensor.fill_(torch.nan if tensor.is_floating_point() else tensor.dtype == torch.bool or -1)


class Double:
    """Stands for ``engm.recording.cuda_graph.OnDevice``; ``made`` are all that were made, ``turns`` how often used."""

    made: ClassVar[list[Double]] = []

    def __init__(self, device: torch.device) -> None:
        self.graphs: list[CapturedDouble] = []
        self.turns = 0
        Double.made.append(self)

    def captured(self, work: Callable[[], list[Tensor]], generators: Sequence[torch.Generator]) -> CapturedDouble:
        for _ in range(3):
            work()
        self.graphs.append(CapturedDouble(work))
        return self.graphs[-1]

    @contextmanager
    def turn(self) -> Iterator[None]:
        self.turns += 1
        yield
        for graph in self.graphs:  # they share their memory
            graph.memory.spoil()


class CapturedDouble:
    def __init__(self, work: Callable[[], list[Tensor]]) -> None:
        self.work, self.memory = work, OnMemory()
        self.outputs = self._run()

    def replay(self) -> None:
        found = self._run()
        assert all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(found, self.outputs, strict=True))

    def _run(self) -> list[Tensor]:
        self.memory.spoil()
        self.memory.number = 0
        with self.memory:
            return self.work()
