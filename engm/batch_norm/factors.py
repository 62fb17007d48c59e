"""Calibration factors of parameter tensors, how old they are, and which of them a step reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class FactorKey(NamedTuple):
    """How norms were measured; each way of measuring has calibration factors of its own.

    Attributes:
        mode: the measurement's (:class:`engm.Measurement`).
        borrowed: whether the measurement was of another graph than the training step's.
        all_ranks: whether the factors are taken from the examples of all ranks together.
    """

    mode: str
    borrowed: bool
    all_ranks: bool = False


@dataclass(frozen=True)
class Factors:
    """Calibration factors of one way of measuring.

    Attributes:
        names: the parameter tensors that norms were taken over so far.
        values: ``[L]``, one factor a parameter tensor; 1 where none was taken yet.
        taken: by tensor, the training step at which its factor was taken.
        good_for: by tensor, training steps after which the factor is due to be replaced; 0: there is none yet.
        batch: examples in the batch that they were taken from, on all ranks.
        error: 0-dimensional, the judged error of weights; None where that was not judged.
        kept: whether the judgement is of factors that had aged, too.
        faithful: of borrowed norms, whether they may be used.
    """

    names: tuple[str, ...]
    values: Tensor
    taken: tuple[int, ...]
    good_for: tuple[int, ...]
    batch: int = 0
    error: Tensor | None = None
    kept: bool = False
    faithful: bool = True

    def of(self, names: tuple[str, ...]) -> tuple[Factors, list[int]]:
        """Factors that know these tensors too, and the places of these among them."""
        places = {name: place for place, name in enumerate(self.names)}
        new = [name for name in names if name not in places]
        if not new:
            return self, [places[name] for name in names]
        values = torch.cat([self.values, self.values.new_ones(len(new))])
        none = (0,) * len(new)
        known = replace(
            self, names=(*self.names, *new), values=values, taken=self.taken + none, good_for=self.good_for + none
        )
        return known.of(names)

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """The tensors of which there are none yet."""
        return tuple(name for name, good_for in zip(self.names, self.good_for, strict=True) if not good_for)

    def among(self, names: tuple[str, ...]) -> Among:
        """Where some tensors, all of which are known, are."""
        known, places = self.of(names)
        return Among(known, names, tuple(places))


@dataclass(frozen=True)
class Among:
    """Where some tensors are among those of which there are factors.

    Attributes:
        known: the factors.
        names: the tensors, the rows of a measurement.
        places: by row, the place of the factor.
    """

    known: Factors
    names: tuple[str, ...]
    places: tuple[int, ...]

    @cached_property
    def missing(self) -> list[int]:
        """The rows without a factor."""
        return [row for row, place in enumerate(self.places) if not self.known.good_for[place]]

    @cached_property
    def soonest(self) -> int:
        """The step at which the first of the factors is due to be replaced; 0 if there is none."""
        known = self.known
        return min((known.taken[k] + known.good_for[k] for k in self.places if known.good_for[k]), default=0)

    def aged(self, step: int, times: int = 1) -> list[int]:
        """The rows whose factors are due to be replaced, or so many times as old as they are good for."""
        known, rows = self.known, enumerate(self.places)
        return [row for row, k in rows if 0 < times * known.good_for[k] <= step - known.taken[k]]

    def values(self) -> Tensor:
        """The factors ``[L]``."""
        if self.places == tuple(range(len(self.known.names))):
            return self.known.values
        each = self.known.values.unbind(0)
        return torch.stack([each[place] for place in self.places])


def by_tensor(number: int | Sequence[int], tensors: int) -> tuple[int, ...]:
    """A number for each tensor; states of versions that took all factors at once have one."""
    return (int(number),) * tensors if isinstance(number, int) else tuple(map(int, number))
