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

Numbers are drawn, since shares that are as regular as numbers could add up to what one example alone makes. With
numbers in order a row ``v`` of one example and ``v / 2`` of the next but one comes out as ``3/2 v`` of the example in
between would, and shares of ``v, -v, -v, v`` that all bits keep two of pass for none.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..capture.calls import Call
from ..distributed import most
from ..repeatable import repeatable_kernels
from ..terms import accumulation_dtype
from ..terms.owners import NOBODY
from ..torch_internals import node_outputs, rows_of_nested
from .trace import Trace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BLIND = -3  # the owner of a row that is not finite, which tells nothing
SEVERAL = -2  # the owner of a row that several examples have a share in
DROWNED = -4  # the owner of a row that may be an example's, but for what rounding left of the shares of others

BASE = 64  # of the numbers whose digits tell the exponents; float32 holds 2^64 times any gradient there may be
# Of a row, as a share of its projections. The passes agree to the last bit, but where torch has no kernel that adds up
# in the same order at every run.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
NARROW_TOLERANCE = 1e-2  # the same for narrower types
ROUNDINGS = 64  # errors that may be left where shares of others cancel, in rounding errors of a tensor's largest row

Key = tuple[int, int]
"""A tensor: the position of the node that made it and the number of the node's output."""


@dataclass
class Print:
    """What is kept of a gradient.

    Attributes:
        shape: of the leading dimensions, by which rows are told apart.
        marks: two random projections of every row, ``[rows, 2]``; of a row of one number that number, ``[rows, 1]``.
        largest: the larger of both, without its sign, ``[rows]``; 0 for a row of zeros.
        tolerance: by how much, as a share of that, a row may differ.
        rounding: of the gradient's type, as a share of a number.
    """

    shape: tuple[int, ...]
    marks: Tensor
    largest: Tensor
    tolerance: float
    rounding: float


def print_of(gradient: Tensor, by_element: bool) -> Print:
    """The print of a gradient. Its last dimension is the row unless every element is to be told apart."""
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
        gradient = gradient if by_element or gradient.dim() < 3 else gradient.flatten(-2)
        leading = gradient.shape[:-1]
    else:
        leading = gradient.shape if by_element or gradient.dim() < 2 else gradient.shape[:-1]
    rows = gradient.reshape(leading.numel(), -1) if gradient.numel() else gradient.new_zeros(leading.numel(), 1)
    tolerance, rounding = TOLERANCE.get(rows.dtype, NARROW_TOLERANCE), torch.finfo(rows.dtype).eps
    rows = rows.to(accumulation_dtype(rows))
    marks = rows if rows.shape[1] == 1 else rows @ _directions(rows.shape[1], rows.dtype, rows.device)
    return Print(tuple(leading), marks, marks.abs().amax(1), tolerance, rounding)


@functools.lru_cache(256)
def _directions(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    drawn = torch.randn(width, 2, generator=generator, dtype=torch.float64, device="cpu")
    # As columns that lie one behind the other: oneMKL's product of rows with two columns is five times faster then.
    return drawn.to(device, dtype).t().contiguous().t()


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
    """

    def __init__(self, most: int, masked: bool) -> None:
        self.base, left_out = 2 if masked else BASE, int(masked and most > 1)
        self.places: list[int] = []
        while (last := self.base ** len(self.places)) < most + 2 * left_out:
            self.places.append(last)
        generator = torch.Generator().manual_seed(most)
        drawn = torch.randperm(min(last - 2 * left_out, 2 * most), generator=generator, device="cpu")
        self.of = left_out + drawn[:most]
        self._examples = torch.full((last,), most, device="cpu")
        self._examples[self.of] = torch.arange(most, device="cpu")

    def digits(self, place: int, n: int, device: torch.device) -> Tensor:
        """A digit of the numbers of the first ``n`` examples."""
        return (self.of[:n] // place % self.base).to(device)

    def examples(self, numbers: Tensor) -> Tensor:
        """Whose the numbers are; of nobody's more than there are."""
        return self._examples.to(numbers.device)[numbers]


@functools.lru_cache(64)
def numbers_of(most: int, masked: bool) -> Numbers:
    """The numbers of so many examples, the same at every call."""
    return Numbers(most, masked)


class Owned:
    """The owners of the rows of one tensor, digit by digit.

    Args:
        plain: the print of the tensor's plain gradient.
        cancelling: shares of others may have cancelled in the tensor, but for rounding. A row that differs by what
            cannot be rounding, beside the largest row of all, is of several, however little that be. One that differs
            by less is its owner's, if that is little beside the owner's largest row, or else nobody's, if the row
            itself is little beside the largest row of every example. If it is not, some example drowns in rounding.

    Attributes:
        plain: the print of the tensor's plain gradient.
        of: ``[rows]``, the owners' numbers (:class:`Numbers`), as far as the digits are known.
        several: ``[rows]``, whether a row turned out to be of several.
        differs: ``[rows]``, by how much a row differed from its plain self, times what the owner's loss was multiplied
            by; kept where shares may have cancelled.
    """

    def __init__(self, plain: Print, cancelling: bool = False) -> None:
        self.plain = plain
        self.differs = torch.zeros_like(plain.largest) if cancelling else None
        self.of = torch.zeros_like(plain.largest, dtype=torch.long)
        self.several = torch.zeros_like(plain.largest, dtype=torch.bool)

    def add_digit(self, scaled: Print, place: int) -> None:
        """Read a digit of the owners from the gradient of losses that were scaled by powers of two."""
        plain, silent = self.plain, self.plain.largest == 0
        power = (scaled.largest / plain.largest).log2().round().nan_to_num(0, 0, 0).clamp(0, BASE + 1)
        factor = torch.exp2(power)
        self._compare(scaled, factor)
        self.several |= ~silent & ((power < 1) | (power > BASE))
        self.of += (power.long() - 1).clamp(0, BASE - 1) * place

    def add_bit(self, masked: Print, place: int) -> None:
        """Read a bit of the owners from the gradient of some of the losses."""
        present = masked.largest > 0.5 * self.plain.largest
        self._compare(masked, present.to(masked.largest.dtype))
        self.of += present.long() * place

    def confirm(self, scaled: Print, factors: Tensor, numbers: Numbers) -> None:
        """Compare with the gradient of losses that were multiplied by these factors, given the digits."""
        of = numbers.examples(self.of)
        self._compare(
            scaled, torch.where(of < len(factors), factors[of.clamp_max(len(factors) - 1)], 1).to(scaled.marks)
        )

    def _compare(self, other: Print, factor: Tensor) -> None:
        plain, times = self.plain, factor.clamp_min(1)
        differs = (other.marks - factor.unsqueeze(1) * plain.marks).abs().amax(1)
        if self.differs is not None:
            self.differs = torch.maximum(self.differs, differs / times)
        else:
            self.several |= ~(differs <= plain.tolerance * plain.largest * times)

    def owners(self, numbers: Numbers, n: int) -> Tensor:
        """``[*leading]``, which of ``n`` examples, :data:`NOBODY`, or another of the numbers below 0."""
        of = numbers.examples(self.of)
        if self.differs is not None and len(of):
            found = self._cancelled(self.differs, of, n)
        else:
            found = torch.where(self.several | (of >= n), SEVERAL, of)
            found = torch.where((self.plain.largest == 0) & ~self.several, NOBODY, found)
        found = torch.where(self.plain.largest.isfinite(), found, BLIND)
        return found.view(self.plain.shape)

    def _cancelled(self, differs: Tensor, of: Tensor, n: int) -> Tensor:
        """The owners where shares of others may have cancelled, given the owners if there are any."""
        largest, tolerance, rounding = self.plain.largest, self.plain.tolerance, self._rounding()
        clean = differs <= torch.minimum(tolerance * largest, rounding)
        own = torch.where(clean & (largest > 0), of, n).clamp_max(n)
        of_examples = largest.new_zeros(n + 1).scatter_reduce(0, own, largest, "amax")[:n]
        of_owners = torch.cat([of_examples, largest.new_zeros(1)])[of.clamp_max(n)]
        owned = (of < n) & (clean | (differs <= tolerance * of_owners))
        nobodys = torch.where(largest <= tolerance * of_examples.amin(), NOBODY, DROWNED)
        return torch.where(differs <= rounding, torch.where(owned, of, nobodys), SEVERAL)

    def _rounding(self) -> Tensor:
        """How much rounding may leave of shares that cancel in a sum of all rows, 0-dimensional."""
        largest = self.plain.largest
        return (
            max(ROUNDINGS, ROUNDINGS / 8 * len(largest) ** 0.5)
            * self.plain.rounding
            * largest.nan_to_num(0, 0, 0).amax()
        )


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
        self.n = losses.shape[0]
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
        self._prints: dict[Any, Print] = {}

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
        # In float16 a power of two might not fit into a gradient.
        masked = by_element or cancelling or torch.float16 in self.traced.dtypes
        numbers = numbers_of(self.most, masked)
        found = {key: Owned(seen, cancelling) for key, seen in self._pass(torch.ones_like(self.losses)).items()}
        self._leave_out_complete_edges(found)
        for place in numbers.places:
            digits = numbers.digits(place, self.n, self.losses.device)
            for key, seen in self._pass((digits if masked else _factors(digits)).to(self.losses)).items():
                if key not in found:
                    continue
                if masked:
                    found[key].add_bit(seen, place)
                else:
                    found[key].add_digit(seen, place)
        if cancelling:
            factors = _drawn_factors(self.n).to(self.losses)
            for key, seen in self._pass(factors).items():
                if key in found:
                    found[key].confirm(seen, factors, numbers)
        calls: dict[int, list[Tensor]] = {}
        for key, owners in _on_cpu({key: owned.owners(numbers, self.n) for key, owned in found.items()}).items():
            if cancelling and bool((owners == DROWNED).any()):
                self.drowned, owners = True, torch.where(owners == DROWNED, NOBODY, owners)
            blind = owners == BLIND
            if bool(blind.any()):
                self.blind[key], owners = blind, torch.where(blind, NOBODY, owners)
            if key[0] == "tensor":
                self.tensors[key[1]] = owners
            elif key[0] == "edge":
                self.edges[key[1], key[2]] = owners
            elif key[0] == "call":
                calls.setdefault(key[1], []).append(owners)
            else:
                self.nodes[key] = owners
        self.calls |= calls  # what was asked again counts

    def scaled(self, positions: Iterable[int]) -> list[tuple[int, dict[Any, Print]]]:
        """The place of every digit of the examples' numbers, and the prints of the gradients of losses scaled by it."""
        self._positions, self._by_element, self._tensors, self._edges = frozenset(positions), False, (), {}
        numbers = numbers_of(self.most, False)
        digits = [(place, numbers.digits(place, self.n, self.losses.device)) for place in numbers.places]
        return [(place, self._pass(_factors(of).to(self.losses))) for place, of in digits]

    def _leave_out_complete_edges(self, found: dict[Any, Owned]) -> None:
        """Look no more at edges by which every row got a gradient."""
        keys = [key for key in found if key[0] == "edge"]
        if not keys:
            return
        gaps = torch.stack([(found[key].plain.largest == 0).any() for key in keys]).tolist()
        for key, has_gaps in zip(keys, gaps, strict=True):
            if not has_gaps:
                del found[key]
        left: dict[int, list[int]] = {}
        for key in found:
            if key[0] == "edge":
                left.setdefault(key[1], []).append(key[2])
        self._edges = left

    # -- one pass ----------------------------------------------------------------------------------------------

    def _pass(self, seeds: Tensor) -> dict[Any, Print]:
        """The prints of all gradients that arrive when the losses are backpropagated with these factors."""
        self._prints = {}
        traced = self.traced
        ends = self._ends()
        passed = self._positions - {position for position, _ in ends}
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
        handles = [traced.order[p].register_prehook(partial(self._arrived, p)) for p in passed]
        handles += [traced.order[p].register_hook(partial(self._passed_on, p)) for p in self._edges]
        try:
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
            for handle in handles:
                handle.remove()
        keys: list[Any] = [*ends, *(("tensor", number) for number in range(len(self._tensors)))]
        for key, gradient in zip(keys, gradients, strict=False):
            self._take(key, gradient)
        found, self._prints = self._prints, {}
        return found

    def _ends(self) -> list[Key]:
        """The outputs of watched nodes below which no other is: where a pass may end."""
        found = []
        for position in self.traced.deepest(self._positions):
            node = self.traced.order[position]
            if node not in self.traced.tokens:
                found += [(position, number) for number in range(len(node_outputs(node)))]
        return found

    def _arrived(self, position: int, gradients: Sequence[Tensor | None]) -> None:
        """Node hook: look at the gradients of a node's outputs."""
        for number, gradient in enumerate(gradients):
            self._take((position, number), gradient)

    def _passed_on(self, position: int, given: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> None:
        """Node hook: look at the gradients that a node passes on."""
        for slot in self._edges[position]:
            self._take(("edge", position, slot), given[slot])

    def _take(self, key: Any, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        self._prints[key] = print_of(dense(gradient), self._by_element)

    def holds(self, call: Call) -> bool:
        """No: gradients are looked at and let go."""
        return False

    def receive(self, call: Call, backprops: Any) -> None:
        """Look at the gradient of a call's output, which a capture hands over."""
        number = self._numbers.get(id(call))
        if number is not None and self.traced.seen_by_collector(number):
            for part, rows in enumerate(rows_of_call(call, backprops)):
                self._take(("call", number, part), rows)


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
        self._met: dict[tuple[int, ...], list[tuple[list[Tensor], Tensor]]] = {}

    def owners(self, key: Any, gradient: Tensor) -> Tensor:
        """The owners of a tensor's rows, ``[*leading]`` on the CPU; the same tensor for rows that are told alike.

        Args:
            key: the tensor: position and number of the output, or ``("call", number of the call, part)``.
            gradient: of the sum of the losses.
        """
        plain = print_of(dense(gradient), False)
        scaled = [(place, prints[key]) for place, prints in self._scaled if key in prints]
        met = self._met.setdefault(plain.shape, [])
        for factors, owners in met:  # most layers work on the rows that another one worked on
            if all(torch.equal(seen.marks, plain.marks * f) for (_, seen), f in zip(scaled, factors, strict=False)):
                return owners
        owned = Owned(plain)
        for place, seen in scaled:
            owned.add_digit(seen, place)
        found = owned.owners(self._numbers, self._n)
        rows = found.flatten()
        factors = [_factors(owned.of // place % BASE).to(plain.marks) for place, _ in scaled]
        # Of nobody's rows nothing is known: half is the factor of no example, and of zeros half is zero.
        factors = [torch.where(rows >= 0, factor, 0.5).unsqueeze(1) for factor in factors]
        owners = found.cpu()
        if len(factors) == len(self._scaled) and bool((owners >= NOBODY).all()):
            met.append((factors, owners))
        return owners


def dense(gradient: Tensor) -> Tensor:
    """The same numbers detached, one behind the other; of a nested gradient its rows."""
    gradient = gradient.detach()
    if gradient.is_nested:
        gradient = rows_of_nested(gradient)
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _on_cpu(found: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """All tensors on the CPU, by one copy."""
    if not found:
        return {}
    flat = torch.cat([owners.flatten() for owners in found.values()]).cpu()
    parts = flat.split([owners.numel() for owners in found.values()])
    return {key: part.view(owners.shape) for (key, owners), part in zip(found.items(), parts, strict=True)}
