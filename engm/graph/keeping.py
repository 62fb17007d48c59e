"""Whether what was measured on one graph holds for others of its structure, whose rows may have other gradients.

What hangs on values that route rows is compared at every step (:mod:`engm.graph.routing`). Here it is about rows that
no gradient came to: another batch may bring one, and then nothing must turn out otherwise than it was planned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import gcd, prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..rules.entries import names_of
from ..terms.owners import NOBODY
from ..torch_internals import (
    entering_shape,
    is_compiled_region,
    is_opaque,
    node_outputs,
    operator_name,
    output_shape,
    passed_to_inputs,
    saved_option,
)
from .arrangement import Arrangement
from .measured import Measured
from .owners import Key, dense
from .plan import Junction
from .routing import (
    ALONG,
    BY_INDICES,
    CHOOSING,
    ELEMENTWISE,
    FIXED,
    HANDING_ON,
    MOVING,
    PARTS,
    PICKING,
    repeats_rows,
    told_dims,
)

# Operators that put elements elsewhere and leave them as they are, so that numbers of examples can be moved by them.
REPLACING = names_of(
    """
    Cat Chunk ConstantPadNd CopySlices DiagEmbed Diagonal Embedding Flip Gather Index IndexAdd IndexCopy IndexFill
    IndexPut IndexPutImpl IndexSelect MaskedScatter MaskedSelect Movedim Narrow PackPaddedSequence Permute PixelShuffle
    PixelUnshuffle ReshapeAlias Roll Rot90 Scatter ScatterAdd Select Slice SliceScatter Sort Split SplitWithSizes
    Squeeze Stack T Take Topk Transpose Tril Triu Unbind UnsafeIndex UnsafeView Unsqueeze View
    """
)

# Those of them that may put elements of the last dimension elsewhere although it is as long as before.
TURNING = names_of("Gather Movedim Permute Rot90 Scatter ScatterAdd T Take Transpose")

# Those of them that leave elements in their order.
IN_ORDER = frozenset(["ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View"])

# Operators that reduce dimensions, by numbers that may let no gradient pass to some elements.
CLOSING = CHOOSING | names_of("Aminmax Kthvalue Logsumexp Mode Nansum Std StdMean Var VarMean")

# Operators of which numbers tell which elements of a row pass a gradient on, and where these lie in the output.
PICKING_ELEMENTS = names_of(
    """
    AdaptiveMaxPool2D AdaptiveMaxPool3D FractionalMaxPool2D FractionalMaxPool3D Glu MaxPool2DWithIndices
    MaxPool3DWithIndices MkldnnMaxPool2D MkldnnMaxPool3D
    """
)

# Operators that pass on what comes to a row of their output to the same row of their input, if to any: to one that has
# the same place along the leading dimensions that both have.
ROW_BY_ROW = (
    FIXED
    | ALONG
    | CHOOSING
    | names_of(
        """
    Expand FusedRmsNorm Glu Kthvalue LinearCrossEntropy Logsumexp Mean Mode NativeLayerNormBackward NllLoss NllLoss2D
    NllLossNd Repeat Std StdMean Sum Var VarMean
    """
    )
)

# How many operators are looked through, one behind the other, for the owners of elements that one of them closes.
FURTHER = 8

# Errors of rounding by which what a node passes on may differ from the same share of one number.
ROUNDINGS_OF_A_MOVE = 8


def parted_by_zeros(rows: Measured, routed: Collection[int]) -> bool:
    """Whether examples may come to lie otherwise, in what several nodes read, if other rows have a gradient.

    Args:
        rows: what was measured.
        routed: positions of the nodes that move rows by values which are compared.
    """
    for (position, slot), whole in _meetings(rows):
        if whole is None:
            return True
        if not rows.about.regular(whole):
            if not _apart_in_any_order(rows, position, slot, whole):
                return True
        elif operator_name(rows.traced.order[position]) in REPLACING:
            continue  # rows without a gradient are moved as it seems they are, or watched
        elif _tells(rows, position, slot):
            if _hides(rows, position, position in routed):
                return True
        elif not (rows.about.regular(rows.edges[position, slot]) or _within_call_like(rows, position, whole)):
            return True
    return False


def stands_alone(rows: Measured, routed: Collection[int]) -> bool:
    """Whether what another graph has shown is not to be added to what is known of this one.

    Two graphs may show that a row gets a gradient by one way and by another, and neither that it does by both. Where
    several nodes read rows in no regular order, or move them by values, the ways may be those of different examples.

    Args:
        rows: what was measured.
        routed: positions of the nodes that move rows by values which are compared.
    """
    return any(
        (whole is not None and not rows.about.regular(whole))
        or (position in routed and _hides(rows, position, by_routes=True))
        for (position, _), whole in _meetings(rows)
    )


def _meetings(rows: Measured) -> Iterator[tuple[Key, Tensor | None]]:
    """The edges by which some rows got no gradient, of what several nodes read, and the owners of all that they read.

    What no gradient comes to at all is left out: it is watched.
    """
    for position, slot in rows.edges:
        child = rows.traced.children[position][slot]
        assert child is not None
        if child in rows.shared or child in rows.silent or position in rows.shared or position in rows.idle:
            continue
        yield (position, slot), rows.nodes.get((child, rows.traced.order[position].next_functions[slot][1]))


def _apart_in_any_order(rows: Measured, position: int, slot: int, whole: Tensor) -> bool:
    """Whether what a node passes on later, to rows in no regular order, is of their owners, or is noticed.

    A row of the node's own outputs either is known, and then has to be of the same example as the row that it is
    passed on to, or is watched (:func:`junctions`, :func:`moved_unseen`, and what is not known of calls).

    Args:
        rows: what was measured.
        position: of the node.
        slot: which of its inputs it is about.
        whole: the owners of the rows that the node reads there, and others too.
    """
    if bool(((whole == NOBODY) & (_as_arranged(rows, whole) != NOBODY)).any()):
        return False  # a layout that is not sure would tell of rows that nobody watches
    if position in rows.structure.inner:
        return _within_call_of_same_rows(rows, position, whole)
    node = rows.traced.order[position]
    name = operator_name(node)
    if name in REPLACING:
        return True  # no data close the way of a row, and where those without a gradient are moved to is watched
    own = rows.nodes.get((position, slot if name in HANDING_ON else 0))
    if own is None or not (name in ROW_BY_ROW or name in HANDING_ON):
        return False
    return not _disagrees(rows, position, slot, whole, _as_arranged(rows, own))


def closed_to_others(rows: Measured) -> bool:
    """Whether a row that a node passes no gradient on to would get one of another example than its own.

    A factor of zero or a maximum that lies elsewhere closes it for now. The rows of the node's own outputs may tell
    whose gradient it would be.
    """
    for position, node in enumerate(rows.traced.order):
        if position in rows.shared or position in rows.idle:
            continue
        name, chooses, parts = operator_name(node), _chooses(node), _parts(rows, position)
        moves = (name in MOVING or name in HANDING_ON) and not chooses
        for slot, child in enumerate(rows.traced.children[position]):
            if child is None or child in rows.shared or not rows.structure.trained_behind(child):
                continue
            if child in rows.silent:  # and so watched
                continue
            whole = rows.nodes.get((child, node.next_functions[slot][1]))
            if whole is None:
                continue
            own = rows.nodes.get((position, 0))
            if any(_closes_elements(rows, position, slot, whole, part) for part in parts):
                return True
            if _turns(node, slot) and _turned(rows, position, slot, whole):
                return True
            if moves or not ((position, slot) in rows.edges or rows.about.present(whole).nobody):
                continue
            if _chooses_among(rows, node, slot, whole) if chooses else _disagrees(rows, position, slot, whole, own):
                return True
    return False


def _turns(node: Any, slot: int) -> bool:
    """Whether a node may put elsewhere what lies along the last dimension of an input."""
    name = operator_name(node)
    if name not in REPLACING:
        return False
    out, given = output_shape(node), entering_shape(*node.next_functions[slot])
    return name in TURNING or out[-1:] != given[-1:] or (name in BY_INDICES and len(out) != len(given))


def _turned(rows: Measured, position: int, slot: int, whole: Tensor) -> bool:
    """Whether a node puts elements of a row where, as its other elements tell, a row of another example lies.

    They got no gradient, or they would tell.

    Args:
        rows: what was measured.
        position: of the node.
        slot: which of its inputs it is about.
        whole: the owners of the rows that the node reads there.
    """
    node, given = rows.traced.order[position], rows.nodes.get((position, 0))
    shape = entering_shape(*node.next_functions[slot])
    if given is None or not given.numel() or not whole.numel() or shape[-1:] == (1,) or whole.dim() == len(shape):
        return False
    along = saved_option(node, "dim")
    if isinstance(along, int) and along % len(shape) == len(shape) - 1 and output_shape(node)[:-1] == shape[:-1]:
        return False  # elements stay in their row
    arranged = _as_arranged(rows, given)
    matched = _matched(node, slot, [arranged], _as_arranged(rows, whole))
    if matched is None:
        return _moves_unseen(rows, position).elements
    (own,), of_rows = matched
    if _differ(own, of_rows):
        return True
    if operator_name(node) in IN_ORDER:
        return False  # they stay beside those of their row, as the slots of routed tokens do
    seen = _matched(node, slot, [arranged], whole)
    return seen is not None and _hides_elements(seen[0][0], seen[1])


def _matched(node: Any, slot: int, own: Sequence[Tensor], whole: Tensor) -> tuple[list[Tensor], Tensor] | None:
    """What is said of rows of a node's output and of one of its inputs, such that they broadcast against each other.

    Args:
        node: may put rows and elements elsewhere, each to one place.
        slot: which of its inputs.
        own: what is said of the rows of the output, each ``[*leading]``, all of one shape.
        whole: what is said of the rows of the input.

    Returns:
        The same by element, or by as many elements that stay together; None where the node would have to be asked.
    """
    name = operator_name(node)
    out, shape = output_shape(node), entering_shape(*node.next_functions[slot])
    if name in IN_ORDER and prod(out) == prod(shape):
        sizes = [prod(out) // max(owners.numel(), 1) for owners in (own[0], whole)]
        unit = gcd(*sizes)
        found = [part.flatten().repeat_interleave(sizes[0] // unit) for part in own]
        return found, whole.flatten().repeat_interleave(sizes[1] // unit)
    dims = permutation_of(node)
    if dims is None:
        return None
    back = [dims.index(dim) for dim in range(len(out))]
    return [_of_elements(part, out).permute(back) for part in own], _of_elements(whole, shape)


def permutation_of(node: Any) -> list[int] | None:
    """Which dimension of the input every dimension of a node's output is, if the node puts them in an order."""
    name = operator_name(node)
    rank = len(output_shape(node))
    if name not in ("Permute", "T", "Transpose") or not rank:
        return None
    if name == "Permute":
        return [dim % rank for dim in cast(Sequence[int], saved_option(node, "dims"))]
    dims = list(range(rank))
    pair = (-2, -1) if name == "T" else (saved_option(node, "dim0"), saved_option(node, "dim1"))
    first, second = (cast(int, dim) % rank for dim in pair)
    dims[first], dims[second] = dims[second], dims[first]
    return dims


def _hides_elements(own: Tensor, whole: Tensor) -> bool:
    """Whether elements of which nothing is known lie in a row that seems to be an example's by its others.

    Args:
        own: what is known of elements.
        whole: what was seen of the rows that they lie in.
    """
    return bool(((own == NOBODY) & (whole != NOBODY)).any())


def _differ(own: Tensor, whole: Tensor) -> bool:
    """Whether somewhere two different examples are said to be the owner."""
    return bool(((own != whole) & (own != NOBODY) & (whole != NOBODY)).any())


def _parts(rows: Measured, position: int) -> list[Tensor]:
    """The owners of those outputs of a node that have the shape of the first."""
    shape = output_shape(rows.traced.order[position])
    outputs = enumerate(node_outputs(rows.traced.order[position]))
    found = [rows.nodes.get((position, number)) for number, output in outputs if tuple(output.shape) == shape]
    return [owners for owners in found if owners is not None]


def _closes_elements(rows: Measured, position: int, slot: int, whole: Tensor, own: Tensor) -> bool:
    """Whether an element of a row that a node reads would get a gradient of another example than the row's.

    A row of which one example alone had a gradient seems to be this example's as a whole. Where the examples lie along
    its elements, as in a product with features in front, the others are only closed for now.

    Args:
        rows: what was measured.
        position: of the node.
        slot: which of its inputs it is about.
        whole: the owners of the rows that the node reads there.
        own: those of one of its outputs.
    """
    node = rows.traced.order[position]
    name = operator_name(node)
    out, given = output_shape(node), entering_shape(*node.next_functions[slot])
    if own.dim() < len(out) or whole.dim() == len(given) or None in rows.traced.shapes[position]:
        return False
    if name in PICKING_ELEMENTS or _chooses_what_it_adds(node):
        return rows.about.present(own).apart
    by_element = (name in ELEMENTWISE and name not in PARTS) or out == given
    if not by_element:
        dims = _reduced(node, len(given))
        if dims is None or len(out) != len(given) - len(dims) * (len(out) != len(given)):
            return False
        for dim in sorted(dims) if len(out) < len(given) else ():
            own = own.unsqueeze(dim)
    rank = max(len(out), len(given))
    own = _as_arranged(rows, own) if by_element else own
    own = own.view([*[1] * (rank - own.dim()), *own.shape])
    shape = [*[1] * (rank - len(given)), *whole.shape, *[1] * (len(given) - whole.dim())]
    seen, whole = whole.view(shape), _as_arranged(rows, whole).view(shape)
    if any(a not in (b, 1) and b != 1 for a, b in zip(whole.shape, own.shape, strict=True)):
        return False
    return _differ(own, whole) or (by_element and _hides_elements(own, seen))


def _reduced(node: Any, rank: int) -> set[int] | None:
    """The dimensions of its input that a node reduces, if it does that by numbers which may let no gradient pass."""
    if operator_name(node) not in CLOSING:
        return None
    return {dim % rank for dim in told_dims(node)} or set(range(rank))


def junctions(rows: Measured, arranged: Mapping[int, Arrangement | None], device: torch.device) -> dict[Key, Junction]:
    """Outputs in which rows come up more than once, or that read what others read, if some had no gradient.

    Args:
        rows: what was measured.
        arranged: by number, the calls whose rows without a gradient are known of.
        device: where to put what is not known.
    """
    found: dict[Key, Junction] = {}
    meeting, skip = {position for position, _ in rows.edges}, rows.shared | rows.structure.no_inputs
    for (position, number), owners in rows.nodes.items():
        if position in rows.shared or position in rows.silent or not rows.structure.trains[position]:
            continue
        if not rows.about.present(owners).nobody:
            continue
        calls = [call for call in rows.structure.calls_at.get(position, ()) if arranged.get(call) is not None]
        coarse = any(rows.traced.calls[call].rule.whole_call for call in calls)  # known by their batch alone
        if calls and not coarse:
            continue
        if coarse and len(rows.traced.shapes[position][number] or ()) == 1:  # one row, which hides whose elements are
            told = _by_readers(rows, (position, number), owners, FURTHER)
            unknown = (owners == NOBODY) & (told != owners.amax())
            if bool(unknown.any()):
                ownership = rows.about.arranged(owners).ownership
                found[position, number] = Junction(ownership, unknown.to(device), by_index=False)
        elif coarse or position in meeting or repeats_rows(rows.traced, position, skip):
            arrangement = rows.about.arranged(owners)
            if arrangement.unknown is not None:
                by_index = operator_name(rows.traced.order[position]) in PICKING
                found[position, number] = Junction(arrangement.ownership, arrangement.unknown.to(device), by_index)
    return found


def owners_by_readers(rows: Measured, number: int, owners: Tensor) -> Tensor:
    """The owners ``[*leading]`` of a call's output by the rows of the operators that read it, element by element.

    An operator may pass no gradient on to an element, as a ReLU does below zero, although one comes to its own.

    Args:
        rows: what was measured.
        number: of the call.
        owners: of the rows of its output.
    """
    if rows.traced.seen_by_collector(number):
        return torch.full_like(owners, NOBODY)
    return _by_readers(rows, (rows.place_of(number), rows.traced.calls[number].output_nr), owners, FURTHER)


def _by_readers(rows: Measured, key: Key, owners: Tensor, further: int) -> Tensor:
    """See :func:`owners_by_readers`; by so many operators one behind the other at most."""
    found, nobody = None, torch.full_like(owners, NOBODY)
    for reader in set(rows.structure.parents[key[0]]):
        node, own = rows.traced.order[reader], rows.nodes.get((reader, 0))
        edges = zip(rows.traced.children[reader], node.next_functions, strict=True)
        if not any(child == key[0] and edge[1] == key[1] for child, edge in edges):
            continue
        alike = rows.traced.shapes[reader][0] == rows.traced.shapes[key[0]][key[1]]
        if operator_name(node) not in ELEMENTWISE or not alike or own is None or own.shape != owners.shape:
            return nobody
        told = torch.where(own == NOBODY, _by_readers(rows, (reader, 0), own, further - 1), own) if further else own
        found = told if found is None else torch.where(found == told, told, NOBODY)
    return nobody if found is None else found


def moved_unseen(rows: Measured, device: torch.device) -> tuple[dict[Key, Junction], frozenset[int]]:
    """Outputs of nodes that move rows which no gradient came to, perhaps to where another example's seem to lie.

    That such rows lie as the others do is an inference, and so it is for those that they are moved to. What the node's
    backward pass makes of the first has to be the second; else the former are not known. Every node is asked but those
    of which it is known that they leave rows where they are, and those that are watched at every step.

    Args:
        rows: what was measured.
        device: where to put what is not known.

    Returns:
        The outputs; and the positions of all nodes that move rows and of which nothing is left to be known.
    """
    found: dict[Key, Junction] = {}
    settled: set[int] = set()
    skip = rows.shared | rows.silent | rows.idle | rows.structure.inner
    for position, node in enumerate(rows.traced.order):
        if position in skip or not _may_move(rows, position) or not rows.structure.trains[position]:
            continue
        moves = _moves_unseen(rows, position) if _gaps(rows, position) else _Moves()
        if moves.settled:
            settled.add(position)
        for number in range(len(node_outputs(node))):
            owners = rows.nodes.get((position, number))
            if owners is None or not rows.about.present(owners).nobody:
                continue
            silent = owners == NOBODY
            unknown = silent if moves.otherwise else silent & (_as_arranged(rows, owners) == NOBODY)
            if moves.otherwise or (moves.from_unknown and bool(unknown.any())):
                ownership = rows.about.arranged(owners).ownership
                found[position, number] = Junction(ownership, unknown.to(device), by_index=False, moved=True)
    return found, frozenset(settled)


def _may_move(rows: Measured, position: int) -> bool:
    """Whether a node may put rows elsewhere, and nobody watches that.

    Calls keep rows apart, and whose those of functions of the user's and of compiled regions are is seen to otherwise.
    """
    node = rows.traced.order[position]
    name = operator_name(node)
    if name in REPLACING:
        return True
    leaves = name in ROW_BY_ROW or name in HANDING_ON or is_opaque(node) or is_compiled_region(node)
    return not (leaves or rows.structure.calls_around(position))


class _Moves(NamedTuple):
    """What a node does with rows without a gradient.

    Attributes:
        otherwise: some whose owner is inferred go elsewhere than to a row that seems to be of the same example, or that
            cannot be told.
        from_unknown: some whose owner is not known go to a row that seems to be of an example.
        to_unknown: some go to a row whose owner is not known.
        elements: of rows with a gradient, some elements go to a row that seems to be of another example.
    """

    otherwise: bool = False
    from_unknown: bool = False
    to_unknown: bool = False
    elements: bool = False

    @property
    def settled(self) -> bool:
        """Whether all is known."""
        return not any(self)


def _moves_unseen(rows: Measured, position: int) -> _Moves:
    """Whether rows without a gradient, by where their own seem to lie, go to where rows of the same example seem to."""
    node = rows.traced.order[position]
    outputs = node_outputs(node)
    if any(output.is_nested_tensor for output in outputs):
        return _Moves(otherwise=True)
    found = _moves_by_shape(rows, position)
    return _moves_as_asked(rows, position) if found is None else found


def _is_apart(rows: Measured, position: int) -> bool:
    """Whether a node is shared, or watched, or within calls, which keep rows apart."""
    return position in rows.shared or position in rows.silent or position in rows.structure.inner


def _moves_by_shape(rows: Measured, position: int) -> _Moves | None:
    """The same for a node whose arguments tell where every element goes; None for any other."""
    node = rows.traced.order[position]
    (child,), owners = rows.traced.children[position][:1], rows.nodes.get((position, 0))
    if owners is None or child is None or child < 0 or not owners.numel():
        return None
    whole = rows.nodes.get((child, node.next_functions[0][1]))
    if whole is None or not whole.numel() or _is_apart(rows, child):
        return None
    matched = _matched(node, 0, [_as_arranged(rows, owners), owners == NOBODY], _as_arranged(rows, whole))
    if matched is None:
        return None
    (own, silent), whole = matched
    known, apart = own != NOBODY, (own != whole) & (whole != NOBODY)
    return _Moves(
        bool((silent & known & apart).any()),
        bool((silent & ~known & (whole != NOBODY)).any()),
        bool((silent & (whole == NOBODY)).any()),
        bool((~silent & apart).any()),
    )


def _moves_as_asked(rows: Measured, position: int) -> _Moves:
    """The same for any node: its backward pass says where every element goes."""
    node = rows.traced.order[position]
    outputs = node_outputs(node)
    shapes = [tuple(output.shape) for output in outputs]
    given = [_inferred(rows, (position, number), shape) for number, shape in enumerate(shapes)]
    unseen = [_unseen(rows, (position, number), shape) for number, shape in enumerate(shapes)]
    types = [output.dtype for output in outputs if output.dtype.is_floating_point or output.dtype.is_complex]
    base, rounding = _base(types), ROUNDINGS_OF_A_MOVE * max(torch.finfo(dtype).eps for dtype in types)

    def moved(parts: Sequence[Tensor]) -> list[Tensor]:
        filled = [
            part.to(out.device, out.dtype).expand(out.shape).contiguous() if out.dtype in types else None
            for part, out in zip(parts, outputs, strict=True)
        ]
        passed = passed_to_inputs(node, filled)
        return [torch.zeros(0) if part is None else dense(part).cpu() for part in passed]

    try:
        inferred = [places & (of != NOBODY) for of, places in zip(given, unseen, strict=True)]
        unknown = [places & (of == NOBODY) for of, places in zip(given, unseen, strict=True)]
        counts, fed, doubted = moved([of != NOBODY for of in given]), moved(inferred), moved(unknown)
        asked: list[tuple[int, Tensor, Tensor]] = []  # which input, whose its elements seem to be, which of them tell
        from_unknown = to_unknown = elements = False
        for slot, child in enumerate(rows.traced.children[position]):
            if child is None or not fed[slot].numel() or not rows.structure.trained_behind(child):
                continue
            if child < 0 and rows.structure.is_input(child):
                return _Moves(otherwise=True)
            if child < 0 or _is_apart(rows, child):
                continue
            behind = _inferred(rows, (child, node.next_functions[slot][1]), tuple(fed[slot].shape))
            known = behind != NOBODY
            from_unknown |= bool(((doubted[slot] != 0) & known).any())
            to_unknown |= bool((((doubted[slot] != 0) | (fed[slot] != 0)) & ~known).any())
            telling = (counts[slot] != 0) & known
            if bool(telling.any()):
                asked.append((slot, behind, telling))
        several = any(bool((counts[slot].real != 1).any()) for slot, _, _ in asked)
        for power in range(_digits(rows.n, base) if asked else 0):
            code = [torch.where(of == NOBODY, 0, _digit(of, power, base, rows.n)) for of in given]
            for exponent in (1, 2) if several else (1,):  # a sum of numbers and of their squares: of equal ones, or not
                arrived = moved([of**exponent for of in code])
                for slot, owners, telling in asked:
                    expected = counts[slot] * _digit(owners, power, base, rows.n) ** exponent
                    # Shares of one that are no whole numbers, as where a mean is taken, are not exact.
                    allowed = torch.where(counts[slot] == counts[slot].real.round(), 0, rounding * expected.abs())
                    wrong = ((arrived[slot] - expected).abs() > allowed) & telling
                    if bool((wrong & (fed[slot] != 0)).any()):
                        return _Moves(otherwise=True)
                    elements |= bool(wrong.any())
    except (RuntimeError, TypeError, ValueError, IndexError):  # an operator that is particular about its gradients
        return _Moves(otherwise=True)
    return _Moves(False, from_unknown, to_unknown, elements)


def _base(types: Sequence[torch.dtype]) -> int:
    """The largest base whose digits' squares, and sums of some of these, are exact in all of these types."""
    narrow = any(torch.finfo(dtype).eps > torch.finfo(torch.float32).eps for dtype in types)
    return 15 if narrow else 1 << 10


def _digit(owners: Tensor, power: int, base: int, n: int) -> Tensor:
    """A digit of the numbers of ``n`` examples, and 1."""
    return owners + 1 if n <= base else owners // base**power % base + 1


def _digits(n: int, base: int) -> int:
    """How many digits the numbers of ``n`` examples have."""
    return 1 if n <= base else 1 + _digits(-(-n // base), base)


def _inferred(rows: Measured, key: Key, shape: tuple[int, ...]) -> Tensor:
    """Whose each element of an output is as far as its arrangement tells, on the CPU; else ``NOBODY``.

    Returns:
        What broadcasts against ``shape``.
    """
    owners = rows.nodes.get(key)
    return torch.full((1,) * len(shape), NOBODY) if owners is None else _of_elements(_as_arranged(rows, owners), shape)


def _unseen(rows: Measured, key: Key, shape: tuple[int, ...]) -> Tensor:
    """Which elements of an output are in rows that no gradient came to, such that it broadcasts likewise."""
    owners = rows.nodes.get(key)
    silent = torch.ones((), dtype=torch.bool) if owners is None else owners == NOBODY
    return _of_elements(silent, shape)


def _of_elements(of_rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What is said of rows ``[*leading]``, such that it broadcasts against a tensor of ``shape``."""
    return of_rows.view([*of_rows.shape, *[1] * (len(shape) - of_rows.dim())])


def _within_call_like(rows: Measured, position: int, whole: Tensor) -> bool:
    """Whether a node is inside of calls in whose outputs the examples lie as in ``whole``, which the node reads.

    A call keeps rows apart, so that they lie so in what it passes on too.
    """
    calls = rows.structure.calls_around(position) if position in rows.structure.inner else []
    outputs = [owners for number in calls for owners in rows.parts(number)]
    own = rows.about.arranged(whole).ownership
    return bool(outputs) and all(
        rows.about.regular(owners) and rows.about.arranged(owners).ownership == own for owners in outputs
    )


def _within_call_of_same_rows(rows: Measured, position: int, whole: Tensor) -> bool:
    """Whether a node is inside of calls that treat rows apart, whose rows are of the same examples as those it reads.

    Rows of a call of which nothing is known are watched.
    """
    for number in rows.structure.calls_around(position):
        parts = rows.parts(number)
        if not rows.traced.calls[number].rule.positionwise or len(parts) != 1 or parts[0].shape != whole.shape:
            return False
        own = _as_arranged(rows, parts[0])
        if _differ(own, whole):
            return False
    return True


def _tells(rows: Measured, position: int, slot: int) -> bool:
    """Whether the rows of a node's own outputs tell whose the rows are that it passes no gradient on to."""
    node = rows.traced.order[position]
    name = operator_name(node)
    return name in MOVING or (name in ELEMENTWISE and entering_shape(*node.next_functions[slot]) == output_shape(node))


def _chooses(node: Any) -> bool:
    """Whether the data tell which of the rows that a node reads get a gradient."""
    return operator_name(node) in CHOOSING or _chooses_what_it_adds(node)


def _chooses_what_it_adds(node: Any) -> bool:
    """Whether a node reduces what indices put together, by numbers that tell what gets a gradient."""
    reduces = operator_name(node) in ("IndexReduce", "ScatterReduce", "SegmentReduce")
    return reduces and saved_option(node, "reduce") not in ("sum", "mean")


def _chooses_among(rows: Measured, node: Any, slot: int, whole: Tensor) -> bool:
    """Whether a node picks one of the elements of different examples."""
    dims = told_dims(node, "axis" if operator_name(node) == "SegmentReduce" else "dim")
    rank = len(entering_shape(*node.next_functions[slot]))
    return bool(rows.about.varying(whole) & ({dim % max(rank, 1) for dim in dims} or set(range(rank))))


def _disagrees(rows: Measured, position: int, slot: int, whole: Tensor, own: Tensor | None) -> bool:
    """Whether a node has a row of another example than the row that it reads, or that cannot be told.

    Nodes that treat every element apart, and those that repeat rows, are compared as broadcasting goes; others, by
    which rows of different examples are not combined, along the leading dimensions that their output has too.

    Args:
        rows: what was measured.
        position: of the node.
        slot: which of its inputs it is about.
        whole: the owners of the rows that the node reads there.
        own: those of its first output, None if it was not looked at.
    """
    node = rows.traced.order[position]
    if own is None or None in rows.traced.shapes[position]:
        return own is not None
    whole = _as_arranged(rows, whole)
    name = operator_name(node)
    if (name in ELEMENTWISE and name not in PARTS) or name in ("Expand", "Repeat"):
        rank, given = len(output_shape(node)), len(entering_shape(*node.next_functions[slot]))
        own = own.view([*own.shape, *[1] * (rank - own.dim())])
        whole = whole.view([*[1] * (rank - given), *whole.shape, *[1] * (given - whole.dim())])
        if any(a not in (b, 1) and b != 1 for a, b in zip(whole.shape, own.shape, strict=True)):
            return True
    else:
        alike = [a == b for a, b in zip(own.shape, whole.shape, strict=False)]
        dims = alike.index(False) if False in alike else len(alike)
        found = [owners.reshape(*owners.shape[:dims], -1) for owners in (own, whole)]
        own, whole = (owners.amax(-1) for owners in found)
        for owners, one in zip(found, (own, whole), strict=True):
            if not bool(((owners == one.unsqueeze(-1)) | (owners == NOBODY)).all()):
                return True
    return _differ(own, whole)


def _as_arranged(rows: Measured, owners: Tensor) -> Tensor:
    """Owners of rows, with those that no gradient comes to and of which their arrangement tells."""
    arrangement = rows.about.arranged(owners)
    whole = rows.laid_out(arrangement.ownership, owners)
    # What is not known is watched.
    return whole if arrangement.unknown is None else torch.where(arrangement.unknown, NOBODY, whole)


def _hides(rows: Measured, position: int, by_routes: bool) -> bool:
    """Whether nothing tells whose some rows of a node's outputs are, or to whom they would be routed."""
    gaps = _gaps(rows, position)
    if not gaps or _is_cut(rows, position):
        return False
    return by_routes or not all(rows.about.regular(owners) for owners in gaps)


def _gaps(rows: Measured, position: int) -> list[Tensor]:
    """The owners of those outputs of a node of which some rows got no gradient."""
    numbers = range(len(node_outputs(rows.traced.order[position])))
    found = (rows.nodes.get((position, number)) for number in numbers)
    return [owners for owners in found if owners is not None and rows.about.present(owners).nobody]


def _is_cut(rows: Measured, position: int) -> bool:
    """Whether the rows of a node without a gradient are those that no other node reads, whatever the data."""
    parents = rows.structure.parents[position]
    return bool(parents) and all(
        operator_name(rows.traced.order[parent]) in MOVING and (not _gaps(rows, parent) or _is_cut(rows, parent))
        for parent in parents
    )
