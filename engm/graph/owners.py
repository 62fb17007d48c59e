"""Whose row is it? Measured: every loss is scaled by a power of two, and each row comes back with its owner's power.

If the loss of an example has the factor ``2^(d + 1)``, ``d`` a digit of the example's number, every row of every tensor
on the way comes out of a backward pass multiplied by the factor of the example that it belongs to, exactly, because
powers of two do not round: whatever sort, gather, mask, padding, graph or expert lies in between. A plain pass and one
scaled pass a digit tell the owner of every row, and no weight gradient is computed. A row that is no one power times
its plain self belongs to several examples. So does one that comes out as it was, as behind a function that hands on the
signs of its gradients: no example has the factor 1. A row without a gradient belongs to nobody.

Rows are told apart by two random projections of them, so that nothing of the size of a gradient is kept between the
passes. What looks like a row of several is asked again, element by element, with masks of 0 and 1 in place of the
powers, which neither underflow nor rounding can fool. The masks are the bits of the examples' numbers, of which there
are so many that every example is left out by one of them and kept by another.

What rounding takes of the shares of others in a row is not seen, and where the loss of one example is so much larger
than all others it takes them whole: of what is computed from parameters alone it would seem to be the only owner. So
where examples turn out to be that uneven, it is asked again with seeds that make them even.

Numbers are drawn, since shares that are as regular as numbers could add up to what one example alone makes. With
numbers in order a row ``v`` of one example and ``v / 2`` of the next but one comes out as ``3/2 v`` of the example in
between would, and shares of ``v, -v, -v, v`` that all bits keep two of pass for none.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .._C import GradientPrints, PrintHooks, add_digit, are_owned, first_alike, other_exponents, owners_of
from ..capture.calls import Call
from ..distributed import most, on_any
from ..repeatable import repeatable_kernels
from ..rules.entries import names_of
from ..terms.owners import NOBODY
from ..torch_internals import node_outputs, operator_name, output_shape, passed_to_input, rows_of_nested
from .trace import Trace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Operators whose indices may name a row more than once, and one that adds up what it picks.
PICKING = names_of("Embedding Gather Index IndexSelect Take UnsafeIndex")
PICKING_OR_ADDING = PICKING | {"EmbeddingBag"}

BLIND = -3  # the owner of a row that is not finite, which tells nothing
SEVERAL = -2  # the owner of a row that several examples have a share in
DROWNED = -4  # the owner of a row that may be an example's, but for what rounding left of the shares of others

BASE = 64  # of the numbers whose digits tell the exponents; float32 holds 2^64 times any gradient there may be
# Of a row, as a share of its projections. The passes agree to the last bit, but where torch has no kernel that adds up
# in the same order at every run.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
NARROW_TOLERANCE = 1e-2  # the same for narrower types
# Errors that may be left where shares of others cancel, in rounding errors of a tensor's largest row. In what is
# rounding alone, as the gradient of scores that nothing competes with, they may be larger: so many times what the
# tensor changes by if the losses are multiplied by a factor that is so many units in the last place larger than 1.
ROUNDINGS = 64
STRETCH = 11
TIMES_ITS_CHANGE = 30

# What is rounding alone, such as what a difference of equal sums leaves, does not become so many times as large as the
# losses: it differs from that by more than such a share of itself, or so many errors of rounding in narrow types.
TIMES_AS_LARGE = (1.3717, 1.7351)
OF_ITSELF, OF_NARROW = 1e-2, 16

# Examples are uneven if, by so many times less than rounding takes, the rows of one are smaller than those of another
# in most tensors that have rows of several. So many of these are looked at, of so many rows at most. They are made even
# up to so many powers of two, which fit into a gradient.
MARGIN = 10
LOOKED_AT, LARGE = 32, 4096
MOST_POWERS = {torch.float64: 300, torch.float32: 40, torch.bfloat16: 40, torch.float16: 10}

# Rows whose owners are told together: of many small tensors that saves the host's time, and larger ones would be copied
# for nothing.
ROWS_AT_ONCE = 1 << 18

Key = tuple[int, int]
"""A tensor: the position of the node that made it and the number of the node's output."""


@dataclass(frozen=True)
class Print:
    """What is kept of a gradient.

    Attributes:
        shape: of the leading dimensions, by which rows are told apart.
        marks: two random projections of every row, ``[rows, 2]``; of a row of one number that number, ``[rows, 1]``.
        dtype: of the gradient.
        exponents: of every row a weighted sum of its elements' exponents, and that of ones, int64 ``[rows, 2]``; None
            where they were not asked for, and of rows of one number.
    """

    shape: tuple[int, ...]
    marks: Tensor
    dtype: torch.dtype
    exponents: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.marks.shape[0]


@functools.lru_cache(256)
def _directions(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    drawn = torch.randn(width, 2, generator=generator, dtype=torch.float64, device="cpu")
    # As columns that lie one behind the other: oneMKL's product of rows with two columns is five times faster then.
    return drawn.to(device, dtype).t().contiguous().t()


def prints_of(gradients: Iterable[Tensor], exponents: bool = False) -> list[Print]:
    """The print of every gradient, whose rows lie along the last dimension."""
    prints = GradientPrints(False, _directions, dense, exponents)
    for number, gradient in enumerate(gradients):
        prints.take(number, gradient)
    return [Print(shape, marks, dtype, sums) for _, shape, marks, dtype, sums in prints.taken()]


def _factors(digits: Tensor) -> Tensor:
    """What losses are multiplied by, in float64, for these digits of their numbers."""
    return torch.exp2(digits.double() + 1)


def _drawn_factors(n: int) -> Tensor:
    """A small power of two for each of ``n`` examples."""
    return torch.exp2(torch.randint(4, (n,), generator=torch.Generator().manual_seed(n), device="cpu").double())


class Numbers:
    """The numbers by whose digits examples are told apart.

    Args:
        most: how many examples there are.
        masked: whether digits are bits. Then neither a row that all masks keep nor one that none does is an example's.

    Attributes:
        base: of the digits.
        places: of the digits that there are, from the lowest on.
        of: ``[most]``, the number of each example.
        all_examples: by number the example; of numbers that nobody has more than there are.
    """

    def __init__(self, most: int, masked: bool) -> None:
        self.base, left_out = 2 if masked else BASE, int(masked and most > 1)
        self.places: list[int] = []
        while (last := self.base ** len(self.places)) < most + 2 * left_out:
            self.places.append(last)
        generator = torch.Generator().manual_seed(most)
        drawn = torch.randperm(min(last - 2 * left_out, 2 * most), generator=generator, device="cpu")
        self.of = left_out + drawn[:most]
        self.all_examples = torch.full((last,), most, device="cpu")
        self.all_examples[self.of] = torch.arange(most, device="cpu")

    def digits(self, place: int, n: int, device: torch.device) -> Tensor:
        """A digit of the numbers of the first ``n`` examples."""
        return (self.of[:n] // place % self.base).to(device)

    def examples(self, numbers: Tensor) -> Tensor:
        """Whose the numbers are, see :attr:`all_examples`."""
        return self.all_examples[numbers]


@functools.lru_cache(64)
def numbers_of(most: int, masked: bool) -> Numbers:
    """The numbers of so many examples, the same at every call."""
    return Numbers(most, masked)


class Owned:
    """The owners of the rows of some tensors, digit by digit, told on the host: there are few numbers a row.

    Args:
        plain: by tensor, the print of its plain gradient; all of one type.
        cancelling: there is one tensor, in which shares of others may have cancelled, but for rounding. A row that
            differs by what cannot be rounding, beside the largest row of all, is of several, however little that be.
            One that differs by less is its owner's, if that is little beside the owner's largest row, or else nobody's,
            if the row itself is little beside the largest row of every example. If it is not, some example drowns in
            rounding.

    Attributes:
        plain: the prints of the plain gradients.
        marks: of all of them, one behind the other.
        rows: how many there are.
        of: ``[rows]``, the owners' numbers (:class:`Numbers`), as far as the digits are known.
        several: ``[rows]``, whether a row turned out to be of several.
        differs: ``[rows]``, by how much a row differed from its plain self, times what the owner's loss was multiplied
            by; kept where shares may have cancelled.
    """

    def __init__(self, plain: Mapping[Any, Print], cancelling: bool = False) -> None:
        self.plain = plain
        self.marks = on_host([seen.marks for seen in plain.values()])
        self.rows = rows = len(self.marks)
        self.of = torch.zeros(rows, dtype=torch.long, device="cpu")
        self.several = torch.zeros(rows, dtype=torch.bool, device="cpu")
        self.differs = torch.zeros(rows, dtype=self.marks.dtype, device="cpu") if cancelling else None
        dtype = _real(next(iter(plain.values())).dtype)
        # By how much a row may differ, as a share of its marks.
        self.tolerance = TOLERANCE.get(dtype, NARROW_TOLERANCE)
        self._eps, self._dtype = torch.finfo(dtype).eps, dtype
        self._noise = self.marks.new_zeros(())
        self._others: list[Tensor] = []  # the marks of all other gradients that were read

    @functools.cached_property
    def largest(self) -> Tensor:
        """The largest mark of every row, without its sign, ``[rows]``; 0 for a row of zeros."""
        return self.marks.abs().amax(1)

    def add_digit(self, scaled: Mapping[Any, Print], place: int) -> None:
        """Read a digit of the owners from the gradients of losses that were scaled by powers of two."""
        add_digit(self.of, self.several, self.marks, self._seen(scaled), place, BASE, self.tolerance)

    def part_by_exponents(self, scaled: Sequence[tuple[int, Mapping[Any, Print]]]) -> None:
        """Note which rows have elements of other examples than those that their digits tell, by the exponents.

        Shares of others in a row's projections are lost in rounding, or taken for that, if they are small enough. There
        every element counts alike.

        Args:
            scaled: by the places of all digits the gradients of losses that were scaled by powers of two.
        """
        plain = _exponents(self.plain, self.plain)
        for place, prints in scaled:
            self.several |= other_exponents(self.of, plain, _exponents(self.plain, prints), place, BASE)

    def add_bit(self, masked: Mapping[Any, Print], place: int) -> None:
        """Read a bit of the owners from the gradients of some of the losses."""
        marks = self._seen(masked)
        present = marks.abs().amax(1) > 0.5 * self.largest
        self._compare(marks, present.to(marks.dtype))
        self.of += present.long() * place

    def _seen(self, others: Mapping[Any, Print]) -> Tensor:
        """The marks of other gradients of the tensors; NaN where there is none."""
        found = [
            others[key].marks if key in others else torch.full_like(seen.marks, torch.nan)
            for key, seen in self.plain.items()
        ]
        self._others.append(on_host(found))
        return self._others[-1]

    def confirm(self, scaled: Mapping[Any, Print], factors: Tensor, numbers: Numbers) -> None:
        """Compare with the gradients of losses that were multiplied by these factors, given the digits."""
        of = numbers.examples(self.of)
        own = torch.where(of < len(factors), factors[of.clamp_max(len(factors) - 1)], 1)
        self._compare(self._seen(scaled), own.to(self.marks))

    def note_rounding(self, stretched: Mapping[Any, Print], stretch: float, whole: float) -> None:
        """Note by how much the gradients change if the losses are a little larger, apart from being larger.

        Args:
            stretched: the gradients of losses that are larger.
            stretch: by what factor.
            whole: the largest mark of all tensors. What is not small beside it is no rounding, but drawn.
        """
        if self.rows:
            changes = (self._seen(stretched) / stretch - self.marks).abs().nan_to_num(0, 0, 0).amax()
            self._noise = torch.where(changes <= self._eps**0.5 * whole, changes, 0)

    def _compare(self, marks: Tensor, factor: Tensor) -> None:
        times = factor.clamp_min(1)
        differs = (marks - factor.unsqueeze(1) * self.marks).abs().amax(1)
        if self.differs is not None:
            self.differs = torch.maximum(self.differs, differs / times)
        else:
            self.several |= ~(differs <= self.tolerance * self.largest * times)

    def owners(self, numbers: Numbers, n: int) -> Tensor:
        """``[rows]``, which of ``n`` examples, :data:`NOBODY`, or another of the numbers below 0."""
        if self.differs is not None and self.rows:
            found = self._cancelled(self.differs, numbers.examples(self.of), n)
            return torch.where(self.largest.isfinite(), found, BLIND)
        found = owners_of(self.of, self.several, self.marks, numbers.all_examples, n, SEVERAL, NOBODY, BLIND)
        if bool(self.several.any()):
            small = self.largest < vanishing(self._dtype)
            for marks in self._others:  # shares of several may have cancelled in the plain gradient alone
                small &= marks.abs().amax(1) < hardly(self._dtype)
            found.masked_fill_(self.several & small, NOBODY)
        return found

    def without_vanished(self, owners: Tensor) -> Tensor:
        """The owners, but nobody's where a tensor hardly has a gradient and that of some row of it has vanished.

        Otherwise, on the way to where all have vanished, a single example would seem to have one. Rows of zeros, as
        those that a slice leaves out, have not vanished.
        """
        vanished = (self.largest > 0) & (self.largest < vanishing(self._dtype))
        if self.differs is not None or not bool(vanished.any()):
            return owners
        lengths = torch.tensor([seen.rows for seen in self.plain.values()], device="cpu")
        of = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
        ends = self.largest.new_zeros(len(lengths))
        most = ends.scatter_reduce(0, of, self.largest, "amax", include_self=False)
        smallest = self.largest.masked_fill(self.largest == 0, torch.inf)
        least = ends.scatter_reduce(0, of, smallest, "amin", include_self=False)
        lowest = owners.new_zeros(len(lengths)).scatter_reduce(0, of, owners, "amin", include_self=False)
        gone = (most < hardly(self._dtype)) & (least < vanishing(self._dtype)) & (lowest >= NOBODY)
        return owners.masked_fill(gone[of], NOBODY)

    def _cancelled(self, differs: Tensor, of: Tensor, n: int) -> Tensor:
        """The owners where shares of others may have cancelled, given the owners if there are any."""
        largest, tolerance, rounding = self.largest, self.tolerance, self._rounding()
        clean = differs <= torch.minimum(tolerance * largest, rounding)
        own = torch.where(clean & (largest > 0), of, n).clamp_max(n)
        of_examples = largest.new_zeros(n + 1).scatter_reduce(0, own, largest, "amax")[:n]
        of_owners = torch.cat([of_examples, largest.new_zeros(1)])[of.clamp_max(n)]
        owned = (of < n) & (clean | (differs <= tolerance * of_owners))
        nobodys = torch.where(largest <= tolerance * of_examples.amin(), NOBODY, DROWNED)
        return torch.where(differs <= rounding, torch.where(owned, of, nobodys), SEVERAL)

    def _rounding(self) -> Tensor:
        """How much rounding may leave of shares that cancel in a sum of all rows, 0-dimensional."""
        errors = ROUNDINGS * max(1, len(self.largest) ** 0.5 / 8)
        estimate = errors * self._eps * self.largest.nan_to_num(0, 0, 0).amax()
        return torch.maximum(estimate, TIMES_ITS_CHANGE * self._noise)


def _exponents(rows_of: Mapping[Any, Print], prints: Mapping[Any, Print]) -> Tensor:
    """The exponents in some prints of tensors, one behind the other, on the CPU; 0 where there are none."""
    found = []
    for key, own in rows_of.items():
        seen = prints[key].exponents if key in prints else None
        found.append(own.marks.new_zeros(own.rows, 2, dtype=torch.long) if seen is None else seen)
    return on_host(found)


def _part_where_otherwise(found: dict[Any, Tensor], again: Mapping[Any, Tensor]) -> None:
    """Note that rows are of several which seem to be so, or another's, in what was found ``again``."""
    parted: dict[tuple[int, int], Tensor] = {}
    for key, owners in found.items():
        other = again.get(key)
        if other is None or other.shape != owners.shape:
            continue
        pair = id(owners), id(other)  # tensors whose rows are the same have one and the same tensor
        if pair not in parted:
            several = (other == SEVERAL) | ((owners != other) & (owners >= 0) & (other >= 0))
            parted[pair] = owners.masked_fill(several, SEVERAL) if bool(several.any()) else owners
        found[key] = parted[pair]


def _as_small_as_rounding(part: Print, whole: Print) -> Tensor:
    """Which rows ``[*leading]`` of a part of a sum are not larger than errors of rounding of its largest row."""
    errors = ROUNDINGS * max(1, whole.rows**0.5 / 8) * torch.finfo(_real(whole.dtype)).eps
    return (part.marks.abs().amax(1) <= errors * whole.marks.abs().amax()).cpu().view(part.shape)


def _others(owners: Tensor, whole: Tensor) -> Tensor:
    """Which rows are of other examples in one answer than in another, of those that have an owner in both."""
    return (owners != whole) & (owners >= 0) & (whole >= 0)


def vanishing(dtype: torch.dtype) -> float:
    """Below which rows of gradients count as zero: numbers that are not normal are too coarse to tell whose they are.

    The gradients of a long recurrence end in such numbers. In float16, where others do too, nothing vanishes.
    """
    return 0.0 if dtype == torch.float16 else 2.0**10 * torch.finfo(dtype).tiny


def unnoticed(dtype: torch.dtype) -> float:
    """Below which gradients add nothing to any norm, since their squares are no normal numbers; 0 in float16."""
    return 0.0 if dtype == torch.float16 else 0.5 * torch.finfo(dtype).tiny ** 0.5


def hardly(dtype: torch.dtype) -> float:
    """So much smaller than :func:`unnoticed` that gradients of other data are unnoticed too."""
    return 2.0**-20 * unnoticed(dtype)


def on_host(marks: list[Tensor]) -> Tensor:
    """Marks one behind the other, in the memory of the host."""
    return (marks[0] if len(marks) == 1 else torch.cat(marks)).cpu().contiguous()


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _together(prints: Mapping[Any, Print]) -> list[dict[Any, Print]]:
    """The prints in groups of one type, none much larger than :data:`ROWS_AT_ONCE` for being a group."""
    found: list[dict[Any, Print]] = []
    open_groups: dict[Hashable, tuple[dict[Any, Print], int]] = {}
    for key, seen in prints.items():
        kind = seen.dtype, seen.marks.shape[1], seen.marks.device
        group, rows = open_groups.get(kind, ({}, ROWS_AT_ONCE))
        if rows + seen.rows > ROWS_AT_ONCE:
            group, rows = {}, 0
            found.append(group)
        group[key] = seen
        open_groups[kind] = group, rows + seen.rows
    return found


class Question:
    """Backward passes that find the owners of the rows of tensors.

    Args:
        traced: the graph.
        losses: ``[n]``.
        seed: what the losses are multiplied by in every pass.
        couplings: positions of batch norms outside of calls whose statistics are constants.
        through: numbers of calls and positions of batch norms whose statistics are *not* constants.
        group: the processes that every backward pass is of, if it is not of this one alone.

    Attributes:
        nodes: by tensor, the owners of its rows, on the CPU.
        tensors: by number of a further tensor that was asked about, the owners of its rows.
        blind: by tensor, which rows were not finite, so that their owners are not known: they count as nobody's here.
        calls: by number of a call whose gradients a collector alone gets to see, the owners in each of its outputs.
        drowned: whether rounding is too large beside some example's rows; such rows count as nobody's here.
        edges: by node (position) and input (slot), of the edges that were asked about and by which some rows got no
            gradient, the owners of the rows of the gradient that goes there.
    """

    def __init__(
        self,
        traced: Trace,
        losses: Tensor,
        seed: float = 1.0,
        couplings: Sequence[int] = (),
        through: Iterable[int] = (),
        group: ProcessGroup | None = None,
    ) -> None:
        self.traced, self.losses, self.seed = traced, losses, seed
        self.couplings, self.through = couplings, frozenset(through)
        self.n, self.group = losses.shape[0], group
        self.most = self.n if group is None else most(group, self.n, losses.device)
        self.nodes: dict[Key, Tensor] = {}
        self.calls: dict[int, list[Tensor]] = {}
        self.tensors: dict[int, Tensor] = {}
        self.blind: dict[Any, Tensor] = {}
        self.drowned = False
        self.edges: dict[Key, Tensor] = {}
        self._tensors: Sequence[Tensor] = ()
        self._edges: Mapping[int, Collection[int]] = {}
        self._numbers = {id(call): number for number, call in enumerate(traced.calls)}
        self._positions: frozenset[int] = frozenset()
        self._by_element = False
        self._rows_of_edges: dict[Any, Tensor] = {}  # whose the rows were, when they were not asked by element
        self._keys: list[Any] = []  # of the prints of one pass

    def ask(
        self,
        positions: Iterable[int],
        by_element: bool = False,
        tensors: Sequence[Tensor] = (),
        edges: Mapping[int, Collection[int]] | None = None,
        cancelling: bool = False,
    ) -> None:
        """Find the owners of the outputs of these nodes, and of all calls.

        Args:
            positions: of the nodes.
            by_element: tell every element apart, by masks of 0 and 1.
            tensors: others to find the owners of.
            edges: by position of a node, the inputs (slots) by which to look at the gradients that it passes on.
            cancelling: ask by masks, which leave rounding as it is, where shares of others may cancel, and a last
                time by factors that are drawn, since shares of many could cancel under all masks.
        """
        self._positions, self._by_element, self._tensors = frozenset(positions), by_element, tensors
        self._edges = edges or {}
        found, groups = self._answered(cancelling)
        if not cancelling:
            powers = self._powers(groups, found)
            if on_any(self.group, bool(powers.any()), self.losses.device):
                seeds = torch.exp2(powers).to(self.losses)
                _part_where_otherwise(found, self._answered(cancelling, seeds)[0])
        calls: dict[int, list[Tensor]] = {}
        self._part_by_edges(found, groups)
        self._part_by_picks(found)
        for key, owners in found.items():
            if key[0] == "tensor":
                self.tensors[key[1]] = owners
            elif key[0] == "edge":
                if not by_element and bool((owners == NOBODY).any()):
                    self.edges[key[1], key[2]] = owners
            elif key[0] == "call":
                calls.setdefault(key[1], []).append(owners)
            else:
                self.nodes[key] = owners
        self.calls |= calls  # what was asked again counts

    def _answered(self, cancelling: bool, even: Tensor | None = None) -> tuple[dict[Any, Tensor], list[Owned]]:
        """The owners of every tensor's rows, and what they were told by.

        Args:
            cancelling: see :meth:`ask`.
            even: what every loss is multiplied by, ``[n]``.
        """
        # In float16 a power of two might not fit into a gradient.
        masked = self._by_element or cancelling or torch.float16 in self.traced.dtypes
        numbers = numbers_of(self.most, masked)
        even = torch.ones_like(self.losses) if even is None else even
        plain = self._pass(even, exponents=not masked)
        alike = [{key: seen} for key, seen in plain.items()] if cancelling else _together(plain)
        groups = [Owned(group, cancelling) for group in alike]
        scaled: list[tuple[int, dict[Any, Print]]] = []
        for place in numbers.places:
            digits = numbers.digits(place, self.n, self.losses.device)
            seen = self._pass(even * (digits if masked else _factors(digits)).to(self.losses), exponents=not masked)
            for group in groups:
                if masked:
                    group.add_bit(seen, place)
                else:
                    group.add_digit(seen, place)
            if not masked:
                scaled.append((place, seen))
        for group in groups if scaled else ():
            group.part_by_exponents(scaled)
        if cancelling:
            factors = _drawn_factors(self.n)
            seen = self._pass(factors.to(self.losses))
            for group in groups:
                group.confirm(seen, factors, numbers)
            stretch = 1 + STRETCH * self.traced.unit
            seen = self._pass(torch.full_like(self.losses, stretch))
            whole = max(
                (float(group.marks.abs().nan_to_num(0, 0, 0).amax()) for group in groups if group.rows), default=0.0
            )
            for group in groups:
                group.note_rounding(seen, stretch, whole)
        return self._on_cpu(groups, numbers), groups

    def _powers(self, groups: Sequence[Owned], found: Mapping[Any, Tensor]) -> Tensor:
        """The powers of two ``[n]`` that make the losses of the examples even; zeros where they are even enough."""
        most = LOOKED_AT // max(1, len(groups)) + 1
        sizes = [size for group in groups for size in itertools.islice(self._sizes(group, found), most)]
        if not sizes:
            return torch.zeros(self.n, device="cpu")
        shares = torch.stack(sizes)
        powers = -shares.masked_fill(~shares.isfinite(), torch.nan).nanmedian(0).values.nan_to_num(0).round()
        powers -= powers.amin()
        types = MOST_POWERS.keys() & {_real(dtype) for dtype in self.traced.dtypes}
        tolerance = max(TOLERANCE.get(dtype, NARROW_TOLERANCE) for dtype in types)
        uneven = powers.amax() > math.log2(1 / (MARGIN * tolerance))
        return powers.clamp(max=min(MOST_POWERS[dtype] for dtype in types)) * uneven

    def _sizes(self, group: Owned, found: Mapping[Any, Tensor]) -> Iterator[Tensor]:
        """How large the rows of the examples are in tensors that have rows of several, as logarithms ``[n]``."""
        keyed = list(zip(group.plain, group.largest.split([seen.rows for seen in group.plain.values()]), strict=True))
        keyed = [(key, rows) for key, rows in keyed if len(rows) <= max(LARGE, self.n)]
        step = len(keyed) // LOOKED_AT + 1  # the first that are asked for are of all parts of the graph
        for key, rows in itertools.chain.from_iterable(keyed[start::step] for start in range(step)):
            owners = found[key].flatten()
            own = owners >= 0
            of_examples = rows.new_zeros(self.n).scatter_reduce(0, owners[own], rows[own], "amax").double()
            if int((of_examples > 0).sum()) > 1:
                yield (of_examples / of_examples.amax()).log2()

    def _part_by_edges(self, found: dict[Any, Tensor], groups: Sequence[Owned]) -> None:
        """Where one edge alone brings a row gradients of another example than its own, the row is of several.

        They may be so small that they are lost beside the others in the sum, and larger at the next step. What is as
        small as rounding, and does not grow as the losses do, is rounding and no gradient.
        """
        parting: dict[Any, tuple[Any, Tensor]] = {}
        for key, owners in found.items():
            if key[0] != "edge":
                continue
            end = self.traced.children[key[1]][key[2]], self.traced.order[key[1]].next_functions[key[2]][1]
            whole = found.get(end)
            if whole is None or whole is owners or whole.shape != owners.shape:
                continue
            if not self._by_element:
                self._rows_of_edges[key] = owners
            elif (rows := self._rows_of_edges.get(key)) is not None and rows.shape == owners.shape[:-1]:
                # Elements may be too small to tell whose they are where the row was not.
                unknown = (owners == NOBODY).all(-1)
                owners = torch.where(unknown.unsqueeze(-1), rows.unsqueeze(-1), owners)
            if bool(_others(owners, whole).any()):
                parting[key] = end, owners
        if not on_any(self.group, bool(parting), self.losses.device):
            return
        plain = {key: seen for group in groups for key, seen in group.plain.items()}
        small = {key: _as_small_as_rounding(plain[key], plain[end]) for key, (end, _) in parting.items()}
        rounding = self._rounding_alone({key: plain[key] for key in parting}, torch.ones_like(self.losses))
        for key, (end, owners) in parting.items():
            rounding[key] &= small[key]
            if bool(rounding[key].any()):
                owners = found[key] = owners.masked_fill(rounding[key], NOBODY)
                if not self._by_element:
                    self._rows_of_edges[key] = owners
            others = _others(owners, found[end])
            if bool(others.any()):
                found[end] = found[end].masked_fill(others, SEVERAL)

    def _rounding_alone(self, plain: Mapping[Any, Print], seeds: Tensor) -> dict[Any, Tensor]:
        """Which rows ``[*leading]`` of some tensors are rounding and nothing else, on the CPU.

        Args:
            plain: the prints of the tensors for losses multiplied by ``seeds``.
            seeds: ``[n]``.
        """
        found = {key: torch.zeros(seen.shape, dtype=torch.bool, device="cpu") for key, seen in plain.items()}
        for times in TIMES_AS_LARGE:
            factor = seeds.new_full((), times)
            again = self._pass(seeds * factor)
            for key, seen in plain.items():
                if key in again:
                    allowed = max(OF_ITSELF, OF_NARROW * torch.finfo(_real(seen.dtype)).eps)
                    differs = (again[key].marks - float(factor) * seen.marks).abs().amax(1)
                    found[key] |= (differs > allowed * seen.marks.abs().amax(1)).cpu().view(seen.shape)
        return found

    def part_dwarfed(self, positions: Iterable[int]) -> None:
        """Find shares of others in what seems to be of one example alone, whose share may dwarf them.

        All examples but some are left out, by every bit of their numbers: what comes when a row's owner is left out is
        not the owner's.

        Args:
            positions: of nodes whose owners were found.
        """
        self._positions, self._tensors, self._edges = frozenset(positions), (), {}
        self._by_element = any(
            owners.dim() == len(self.traced.shapes[position][number] or ()) > 1
            for (position, number), owners in self.nodes.items()
            if position in self._positions
        )
        numbers = torch.arange(self.n, device=self.losses.device)
        for bit in range((self.most - 1).bit_length()):
            for kept in (0, 1):
                seeds = ((numbers >> bit & 1) == kept).to(self.losses)
                left: dict[Any, Print] = {}
                for key, seen in self._pass(seeds).items():
                    owners = self.nodes.get(key)
                    if owners is not None and bool(self._left(owners, seen, bit, kept).any()):
                        left[key] = seen
                if not on_any(self.group, bool(left), self.losses.device):
                    continue
                rounding = self._rounding_alone(left, seeds)
                for key, seen in left.items():
                    others = self._left(self.nodes[key], seen, bit, kept) & ~rounding[key]
                    owners = self.nodes[key]
                    owners = owners.view([*owners.shape, *[1] * (others.dim() - owners.dim())]).expand(others.shape)
                    if bool(others.any()):
                        self.nodes[key] = owners.masked_fill(others, SEVERAL)

    @staticmethod
    def _left(owners: Tensor, seen: Print, bit: int, kept: int) -> Tensor:
        """Which rows ``[*leading]`` have a gradient although their owners are left out by a bit of their numbers."""
        some = (seen.marks.abs().amax(1) > vanishing(_real(seen.dtype))).cpu().view(seen.shape)
        owners = owners.view([*owners.shape, *[1] * (some.dim() - owners.dim())])
        return some & (owners >= 0) & ((owners >> bit & 1) != kept)

    def _part_by_picks(self, found: dict[Any, Tensor]) -> None:
        """The same where one node picks a row several times, for rows of different examples.

        A node's backward pass is linear. So a row comes from several examples if it gets something both from those
        whose number has some bit and from those whose number has it not.
        """
        for position, node in enumerate(self.traced.order):
            if operator_name(node) not in PICKING_OR_ADDING or None in self.traced.shapes[position]:
                continue
            end = self.traced.children[position][0], node.next_functions[0][1]
            whole, own = found.get(end), found.get((position, 0), self.nodes.get((position, 0)))
            if whole is None or own is None:
                continue
            present = own[own >= 0].unique()
            shape, others = output_shape(node), torch.zeros_like(whole, dtype=torch.bool)
            for bit in range(int(present.max()).bit_length() if present.numel() > 1 else 0):
                with_bit = (own >> bit & 1).bool()
                got = [self._gets(node, shape, (own >= 0) & side, whole) for side in (with_bit, ~with_bit)]
                others |= got[0] & got[1]
            if bool(others.any()):
                found[end] = whole.masked_fill(others & (whole >= 0), SEVERAL)

    def _gets(self, node: Any, shape: tuple[int, ...], rows: Tensor, whole: Tensor) -> Tensor:
        """Which rows of a node's first input get something from some rows of its output, ``[*whole.shape]``."""
        output = node_outputs(node)[0]
        gradient = rows.view(*rows.shape, *[1] * (len(shape) - rows.dim())).expand(shape)
        rest = [None] * (len(node_outputs(node)) - 1)
        passed = passed_to_input(node, 0, [gradient.to(output.device, output.dtype), *rest])
        if passed is None:
            return torch.zeros_like(whole, dtype=torch.bool)
        return (dense(passed) != 0).reshape(*whole.shape, -1).any(-1).cpu()

    def _on_cpu(self, groups: Sequence[Owned], numbers: Numbers) -> dict[Any, Tensor]:
        """The owners of every tensor's rows, ``[*leading]``, by one copy; notes which are not known.

        Tensors whose rows are the same have one and the same tensor.
        """
        if not groups:
            return {}
        owners = [group.without_vanished(group.owners(numbers, self.n)) for group in groups]
        flat = torch.cat(owners).cpu()
        drowned = flat == DROWNED
        self.drowned |= bool(drowned.any())
        flat = torch.where(drowned, NOBODY, flat)
        blind = flat == BLIND
        some_blind = bool(blind.any())
        flat = torch.where(blind, NOBODY, flat) if some_blind else flat
        plain = {key: seen for group in groups for key, seen in group.plain.items()}
        lengths = [seen.rows for seen in plain.values()]
        found: dict[Any, Tensor] = {}
        same: dict[Hashable, Tensor] = {}
        parts = zip(plain.items(), flat.split(lengths), first_alike(flat, lengths), strict=True)
        for (key, seen), rows, first in parts:
            if (first, seen.shape) not in same:
                same[first, seen.shape] = rows.view(seen.shape)
            found[key] = same[first, seen.shape]
        for (key, seen), rows in zip(plain.items(), blind.split(lengths) if some_blind else (), strict=False):
            if bool(rows.any()):
                self.blind[key] = rows.view(seen.shape)
        return found

    def scaled(self, positions: Iterable[int]) -> list[tuple[int, dict[Any, Print]]]:
        """The place of every digit of the examples' numbers, and the prints of the gradients of losses scaled by it."""
        self._positions, self._by_element, self._tensors, self._edges = frozenset(positions), False, (), {}
        numbers = numbers_of(self.most, False)
        digits = [(place, numbers.digits(place, self.n, self.losses.device)) for place in numbers.places]
        return [(place, self._pass(_factors(of).to(self.losses), exponents=True)) for place, of in digits]

    # -- one pass ----------------------------------------------------------------------------------------------

    def _pass(self, seeds: Tensor, exponents: bool = False) -> dict[Any, Print]:
        """The prints of all gradients that arrive when the losses are backpropagated with these factors."""
        traced = self.traced
        self._prints, self._keys = GradientPrints(self._by_element, _directions, dense, exponents), []
        ends = self._ends()
        targets = [GradientEdge(traced.order[position], number) for position, number in ends]
        targets += map(get_gradient_edge, self._tensors)
        tokens = [traced.edge(position, 0) for position in self._positions if traced.order[position] in traced.tokens]
        # A pass that ends at a node does not show what the node would pass on to an input of the network.
        onwards = {
            traced.order[position].next_functions[slot]
            for position, slots in self._edges.items()
            for slot in slots
            if (child := traced.children[position][slot]) is not None and child < 0
        }
        tokens += [GradientEdge(node, number) for node, number in onwards if node is not None]
        hooks = PrintHooks(self._prints)
        try:
            self._watch(hooks, self._positions - {position for position, _ in ends})
            with (
                traced.frozen_statistics(self.couplings, self.through),
                traced.collecting(self),
                repeatable_kernels(self.losses.device),
            ):
                gradients: Sequence[Tensor | None] = ()
                if targets or tokens:
                    gradients = torch.autograd.grad(
                        self.losses, [*targets, *tokens], seeds * self.seed, retain_graph=True, allow_unused=True
                    )
        finally:
            hooks.remove()
        keys: list[Any] = [*ends, *(("tensor", number) for number in range(len(self._tensors)))]
        for key, gradient in zip(keys, gradients, strict=False):
            if gradient is not None:
                self._prints.take(self._number_of(key), gradient)
        taken = self._prints.taken()
        return {self._keys[number]: Print(shape, marks, dtype, sums) for number, shape, marks, dtype, sums in taken}

    def _watch(self, hooks: PrintHooks, passed: Iterable[int]) -> None:
        """Look at the gradients that nodes get, and at those that they pass on by the edges that are asked about."""
        for position in passed:
            node = self.traced.order[position]
            numbers = range(len(node_outputs(node)))
            hooks.watch_outputs(node, [(number, self._number_of((position, number))) for number in numbers])
        for position, slots in self._edges.items():
            numbered = [(slot, self._number_of(("edge", position, slot))) for slot in slots]
            hooks.watch_inputs(self.traced.order[position], numbered)

    def _number_of(self, key: Any) -> int:
        """A number for the print of a tensor in this pass."""
        self._keys.append(key)
        return len(self._keys) - 1

    def _ends(self) -> list[Key]:
        """The outputs of watched nodes below which no other is: where a pass may end."""
        found = []
        for position in self.traced.deepest(self._positions):
            node = self.traced.order[position]
            if node not in self.traced.tokens:
                found += [(position, number) for number in range(len(node_outputs(node)))]
        return found

    def holds(self, call: Call) -> bool:
        """No: gradients are looked at and let go."""
        return False

    def receive(self, call: Call, backprops: Any) -> None:
        """Look at the gradient of a call's output, which a capture hands over."""
        number = self._numbers.get(id(call))
        if number is not None and self.traced.seen_by_collector(number):
            for part, rows in enumerate(rows_of_call(call, backprops)):
                self._prints.take(self._number_of(("call", number, part)), rows)


def rows_of_call(call: Call, backprops: Any) -> list[Tensor]:
    """The gradients of a call's outputs, such that rows are told apart by the dimensions that the call's rule does."""
    rows = call.by_example(backprops)
    return [row.flatten(1) if call.rule.whole_call and row.dim() > 2 else row for row in rows]


class Answers:
    """Scaled gradients, from which the owners of a tensor's rows can be told as soon as its plain gradient is there.

    This is for graphs of which it is known where to look: the pass that norms are taken from is the plain pass then.

    Args:
        question: about the graph; asked by powers of two, in passes of this process alone.
        positions: of the nodes whose outputs will be asked about.
    """

    def __init__(self, question: Question, positions: Iterable[int]) -> None:
        self._n = question.n
        self._numbers = numbers_of(question.most, False)
        self._scaled = question.scaled(positions)
        digits = [self._numbers.digits(place, self._n, torch.device("cpu")) for place in self._numbers.places]
        self._largest = max((float(_factors(of).amax()) for of in digits), default=1.0)
        # By the shape of rows, the numbers that were met, and the owners that they stand for.
        self._met: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}

    def any_gradient(self, positions: Collection[int]) -> bool:
        """Whether gradients of scaled losses came to one of some nodes, be it that those of their sum cancel there."""
        return any(
            key[0] in positions and bool((seen.marks.abs() > self._largest * unnoticed(seen.dtype)).any())
            for _, prints in self._scaled
            for key, seen in prints.items()
        )

    def owners(self, key: Any, gradient: Tensor) -> Tensor:
        """The owners of a tensor's rows, ``[*leading]`` on the CPU; the same tensor for rows that are told alike.

        Args:
            key: the tensor: position and number of the output, or ``("call", number of the call, part)``.
            gradient: of the sum of the losses.
        """
        (plain,) = prints_of([gradient], exponents=True)
        owners = self._by_marks(key, plain)
        return owners if self._owned_whole(key, plain, owners) else torch.full_like(owners, SEVERAL)

    def _owned_whole(self, key: Any, plain: Print, owners: Tensor) -> bool:
        """Whether no row has an element of another example than its owner, by the exponents.

        See :meth:`Owned.part_by_exponents`. In rows of nobody no element counts.
        """
        if plain.exponents is None:
            return True
        of, own = self._numbers.of[owners.flatten().clamp_min(0)], {key: plain}
        sums = _exponents(own, own)
        scaled = [(place, _exponents(own, prints)) for place, prints in self._scaled if key in prints]
        return not any(bool(other_exponents(of, sums, seen, place, BASE).any()) for place, seen in scaled)

    def _by_marks(self, key: Any, plain: Print) -> Tensor:
        """The owners by the projections of rows."""
        marks = on_host([plain.marks])
        found = [(place, on_host([prints[key].marks])) for place, prints in self._scaled if key in prints]
        complete = len(found) == len(self._scaled)
        places, scaled = [place for place, _ in found], [seen for _, seen in found]
        met = self._met.setdefault(plain.shape, [])
        for numbers, owners in met if complete else ():  # most layers work on the rows that another one worked on
            if are_owned(numbers, owners.flatten(), marks, scaled, places, BASE):
                return owners
        owned = Owned({key: plain})
        for place, prints in self._scaled:
            owned.add_digit(prints, place)
        owners = owned.owners(self._numbers, self._n).view(plain.shape)
        if complete and bool((owners >= NOBODY).all()):
            met.append((owned.of, owners))
        return owners


def dense(gradient: Tensor) -> Tensor:
    """The same numbers detached, one behind the other; of a nested gradient its rows."""
    gradient = gradient.detach()
    if gradient.is_nested:
        gradient = rows_of_nested(gradient)
    return gradient if gradient.layout == torch.strided else gradient.to_dense()
