"""From measured owners to the order that the examples lie in: a layout where there is one, else the owners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..terms.layout import Layout
from ..terms.owners import NOBODY, Owners, Ownership
from .owners import SEVERAL

# Examples that have to be seen in a column of rows before rows without a gradient count as known, and places along a
# dimension before the owners count as the same along it.
WITNESSES = 2


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Where the examples lie in a tensor, and what of that is an inference.

    Attributes:
        ownership: in which rows every example lies.
        unknown: rows ``[*leading]`` without a gradient, as many as were asked about, so that nothing tells whether they
            lie as the others do; None if there are none. They count nothing as long as they have no gradient.
        lost: whether rows that are not finite may be anybody's, or everybody's.
    """

    ownership: Ownership
    unknown: Tensor | None = None
    lost: bool = False


def arranged(owners: Tensor, n: int, blind: Tensor | None = None, culprit: int | None = None) -> Arrangement:
    """The arrangement of a tensor.

    Args:
        owners: of its rows, ``[*leading]`` on the CPU: numbers of examples or ``NOBODY``.
        n: number of examples.
        blind: which rows are not finite. Where no layout tells whose they are they count for the ``culprit``.
        culprit: an example whose loss is not finite either. Where there is none, or where it might be that several
            examples have a share in these rows, since none of the others is an example's, they are lost.
    """
    found = _arranged(owners, n, blind, culprit or 0)
    layout = found.ownership
    if blind is not None and n > 1:
        unknown = blind if isinstance(layout, Owners) else found.unknown
        lost = unknown is not None and bool((blind & unknown).any())
        found = replace(found, lost=lost and (culprit is None or not bool((owners >= 0).any())))
    if isinstance(layout, Layout) and layout.dim > 1:
        return replace(found, ownership=_written_out(layout, owners.shape, n))
    return found


def _written_out(layout: Layout, shape: Sequence[int], n: int) -> Owners:
    """The owners of rows that lie along a dimension of a tensor of ``shape`` which a layout cannot name."""
    along = Owners.regular(replace(layout, dim=0), n, torch.device("cpu")).of
    return Owners(along.expand(*shape[: layout.dim], -1), n)


def _arranged(owners: Tensor, n: int, blind: Tensor | None, culprit: int) -> Arrangement:
    """See :func:`arranged`; a layout may lie along any dimension."""
    rows = without_trailing(owners)
    found, dim = None, rows.dim() - 1
    if rows.dim() == 1:
        found = _fitted(rows, n, dim)
    elif rows.dim() > 1 and rows.numel():
        last = rows.amax(tuple(range(dim)))
        if bool(((rows == last) | (rows == NOBODY)).all()):
            found = _fitted(last, n, dim)
    if found is not None and found.unknown is not None:  # of all that was left out above, too
        along = [-1 if other == dim else 1 for other in range(owners.dim())]
        found = replace(found, unknown=found.unknown.view(along).expand_as(owners))
    silent = owners == NOBODY
    if found is not None:
        # What was left out above is known if the examples that are seen lie as the layout says, but not from one.
        witnessed = owners[~silent].unique().numel() >= min(WITNESSES, n)
        if bool(silent.any()) and (not witnessed or _fits_elsewhere(owners, n, found.ownership)):
            return replace(found, unknown=silent)
        return _with_lone_places(found, owners, n) if bool(silent.any()) and n > 1 else found
    if blind is not None:
        rows = torch.where(blind.reshape(*rows.shape, -1).any(-1), culprit, rows)
        silent &= ~blind
    return Arrangement(Owners(rows, n), silent if bool(silent.any()) else None)


def _with_lone_places(found: Arrangement, owners: Tensor, n: int) -> Arrangement:
    """Where one place along a dimension tells of the others, what those hold without a gradient is not known."""
    unknown = torch.zeros_like(owners, dtype=torch.bool)
    silent = owners == NOBODY
    for dim, length in enumerate(owners.shape):
        if length == 1 or (isinstance(found.ownership, Layout) and dim == found.ownership.dim):
            continue
        others = [other for other in range(owners.dim()) if other != dim]
        lowest = torch.where(silent, n, owners).amin(others, keepdim=True)
        witnessed = owners.amax(others, keepdim=True) > lowest  # by two examples or more
        if int(witnessed.sum()) < WITNESSES:
            unknown |= silent & ~witnessed
    if not bool(unknown.any()):
        return found
    return replace(found, unknown=unknown if found.unknown is None else unknown | found.unknown)


class Present(NamedTuple):
    """What occurs among the owners of a tensor's rows.

    Attributes:
        several: some row is of several examples.
        nobody: some row got no gradient.
        anybody: some row got one.
        apart: some row is of another example than the first.
    """

    several: bool
    nobody: bool
    anybody: bool
    apart: bool


class Arrangements:
    """How examples lie in tensors, worked out once for every tensor of owners, of which many nodes have the same.

    Args:
        losses: ``[n]``, of the examples.
    """

    def __init__(self, losses: Tensor) -> None:
        self.n = losses.shape[0]
        self._losses = losses
        self._found: dict[tuple[str, int], Any] = {}
        self._asked: dict[int, Tensor] = {}  # kept so that their ids stay theirs

    def arranged(self, owners: Tensor, blind: Tensor | None = None) -> Arrangement:
        """See :func:`arranged`."""
        if blind is not None:
            return arranged(owners, self.n, blind, self.culprit)
        return self._once("arranged", owners, lambda: arranged(owners, self.n))

    @cached_property
    def culprit(self) -> int | None:
        """The first example whose loss is not finite, if there is one."""
        return culprit_of(self._losses)

    def regular(self, owners: Tensor) -> bool:
        """See :func:`regular`."""
        return self._once("regular", owners, lambda: regular(owners, self.n))

    def varying(self, owners: Tensor) -> set[int]:
        """See :func:`varying`."""
        return self._once("varying", owners, lambda: varying(owners, self.n))

    def examples(self, owners: Tensor) -> Tensor:
        """Which examples have rows, ``[n]``."""
        return self._once("examples", owners, lambda: _examples(owners, self.n))

    def present(self, owners: Tensor) -> Present:
        """What occurs among the owners."""
        return self._once("present", owners, lambda: _present(owners))

    def _once(self, what: str, owners: Tensor, answer: Callable[[], Any]) -> Any:
        key = what, id(owners)
        if key not in self._found:
            self._asked[id(owners)] = owners
            self._found[key] = answer()
        return self._found[key]


def culprit_of(losses: Tensor) -> int | None:
    """The first example whose loss is not finite, if there is one."""
    found = (~losses.detach().isfinite()).nonzero()
    return int(found[0]) if len(found) else None


def _present(owners: Tensor) -> Present:
    if not owners.numel():
        return Present(False, False, False, False)
    several, nobody = bool((owners == SEVERAL).any()), bool((owners == NOBODY).any())
    highest = int(owners.max())
    return Present(several, nobody, several or highest >= 0, highest > 0)


def _examples(owners: Tensor, n: int) -> Tensor:
    found = torch.zeros(n, dtype=torch.bool, device=owners.device)
    found[owners[owners >= 0]] = True
    return found


def without_trailing(owners: Tensor) -> Tensor:
    """The owners without the last dimensions along which they are the same; one dimension stays."""
    while owners.dim() > 1 and owners.numel():
        one = owners.amax(-1)
        if not bool(((owners == one.unsqueeze(-1)) | (owners == NOBODY)).all()):
            break
        owners = one
    return owners


def varying(owners: Tensor, n: int) -> set[int]:
    """The dimensions along which owners ``[*leading]`` of ``n`` examples differ, or may differ as far as is known."""
    anywhere = {dim for dim, length in enumerate(owners.shape) if length > 1}
    if bool((owners == NOBODY).any()) and owners.unique().numel() <= min(WITNESSES, n):
        plain = torch.arange(n).view(-1, *[1] * (owners.dim() - 1))
        if owners.dim() and owners.shape[0] == n and bool(((owners == plain) | (owners == NOBODY)).all()):
            return {0}  # the usual order, in which gradients that vanish leave one example or none
        return anywhere
    constant = _constant(owners)
    if constant is None:
        return anywhere
    return set(range(owners.dim() if owners.numel() else 0)) - constant


def regular(owners: Tensor, n: int) -> bool:
    """Whether owners ``[*leading]`` surely are a layout along one of the dimensions, whatever the others.

    A single number has no dimension to lie along.
    """
    if owners.dim() == 0 or _constant(owners) is None:
        return False
    while owners.dim() > 1:
        same = next((dim for dim in range(owners.dim()) if _collapses(owners, dim)), None)
        if same is None:
            return False
        owners = owners.amax(same)
    found = _fitted(owners, n, 0)
    return found is not None and found.unknown is None


def _constant(owners: Tensor) -> set[int] | None:
    """The dimensions along which the owners are the same.

    None if too few rows are seen to tell: along each of some dimensions they may be the same, but not along all.
    """
    found = {dim for dim in range(owners.dim() if owners.numel() else 0) if _collapses(owners, dim)}
    if len(found) > 1:
        one = owners.amax(sorted(found), keepdim=True)
        if not bool(((owners == one) | (owners == NOBODY)).all()):
            return None
    return found


def _collapses(owners: Tensor, dim: int) -> bool:
    one = owners.amax(dim, keepdim=True)
    return bool(((owners == one) | (owners == NOBODY)).all())


def _fits_elsewhere(owners: Tensor, n: int, found: Ownership) -> bool:
    """Whether the examples that are seen may as well lie along another dimension, as one row of each does."""
    for dim in range(owners.dim()):
        if isinstance(found, Layout) and dim != found.dim:
            others = [other for other in range(owners.dim()) if other != dim]
            along = owners.amax(others, keepdim=True)
            if bool(((owners == along) | (owners == NOBODY)).all()) and _fitted(along.flatten(), n, dim) is not None:
                return True
    return False


def without_witnesses(unknown: Tensor, layout: Layout) -> Tensor:
    """The rows that stay unknown, given that all others were seen to lie as the layout says."""
    others = [dim for dim in range(unknown.dim()) if dim != layout.dim]
    seen = (~unknown).any(others) if others else ~unknown
    if others and bool((unknown.any(others) == seen).any()):
        return unknown  # not for want of witnesses
    split = seen.view(layout.outer, -1, layout.inner)
    few = split.sum(1, keepdim=True) < min(WITNESSES, split.shape[1])
    shape = [1] * unknown.dim()
    shape[layout.dim] = -1
    return unknown & few.expand_as(split).reshape(shape)


def _fitted(rows: Tensor, n: int, dim: int) -> Arrangement | None:
    """The layout along ``dim`` that owners ``[length]`` agree with, if there is one."""
    length = rows.shape[0]
    if length == 0 or length % n:
        return None
    numbers = torch.arange(n).view(1, n, 1)
    silent, ambiguous = rows == NOBODY, torch.zeros_like(rows, dtype=torch.bool)
    complete = not bool(silent.any())
    first: Tensor | None = None  # the owners of all rows by the first layout that fits
    best: tuple[int, Arrangement] | None = None
    for outer in _divisors(length // n):
        split = rows.view(outer, n, -1)
        if not bool(((split == numbers) | (split == NOBODY)).all()):
            continue
        layout = Layout(dim, outer, split.shape[2])
        if complete:
            return Arrangement(layout)
        seen = (split != NOBODY).sum(1, keepdim=True) >= min(WITNESSES, n)
        unknown = silent & ~seen.expand_as(split).reshape(-1)
        missing = int(unknown.sum())
        if best is None or missing < best[0]:
            best = missing, Arrangement(layout, unknown)
        given = numbers.expand_as(split).reshape(-1)
        first = given if first is None else first
        ambiguous |= given != first
    if best is None:
        return None
    found = best[1]
    unknown = silent & ambiguous if found.unknown is None else found.unknown | (silent & ambiguous)
    return replace(found, unknown=unknown if bool(unknown.any()) else None)


def _divisors(number: int) -> list[int]:
    """Divisors, 1 and the number itself first."""
    small = [k for k in range(1, int(number**0.5) + 1) if number % k == 0]
    return sorted({*small, *(number // k for k in small)}, key=lambda k: (k not in (1, number), k))
