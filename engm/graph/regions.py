"""Which rows of a compiled region are whose, whatever lies in them? The code of its backward pass tells, if anything.

A region made by ``torch.compile`` is one node of the graph, and what it saves does not tell how it moves rows: by
indices, masks or an order of any type that it may have computed itself. Nor is it seen whether some factor keeps
examples apart that would influence each other without it. But the backward pass that its compiler was given is a list
of operators, and many of them treat rows alike whatever their operands hold. So the owners of the gradients that a
region begins with are taken through these operators. Where the gradients of all layers inside, and those that the
region hands on, have owners at the end, they have the same owners in every graph of the same structure. Otherwise the
owners have to be measured at every step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..rules.entries import names_of, owners_of
from ..terms.owners import Ownership
from ..torch_internals import Node, RegionBackward, backward_of_region, is_operator, output_shape, schema_of

# What is known of a tensor: None if no gradient is in it, else the owners of its elements (from 1 on; 0: nobody's) as a
# tensor of its shape; MIXED if these are not known, or may be others for other data.
MIXED = "mixed"
State = Tensor | str | None
States = State | list[State]


def keeps_rows(node: Node, given: Mapping[int, Ownership | None], wanted: Collection[int], n: int) -> bool:
    """Whether a region gives every row in it, and every row that it hands on, to one example, whatever the data.

    Args:
        node: the region's.
        given: by output of the node that a gradient may come to, where the examples lie in it; None: not known.
        wanted: the inputs (slots) of the node for which that is asked.
        n: number of examples.
    """
    backward = backward_of_region(node)
    if backward is None:
        return False
    begins: dict[int, State] = {}
    for number, where in given.items():
        shape = output_shape(node, number)
        begins[number] = (
            MIXED if where is None else _whole(owners_of(where, shape, n, torch.device("cpu")).of + 1, shape)
        )
    return Reading(backward, begins).keeps(wanted)


class Reading:
    """Takes owners through the operators of a backward pass.

    Args:
        backward: the pass.
        begins: the owners in the gradients that it begins with, by output of the region's node.

    Attributes:
        states: what is known of every node's result, a list if there are several.
    """

    def __init__(self, backward: RegionBackward, begins: Mapping[int, State]) -> None:
        self._backward, self._begins = backward, begins
        self.states: dict[torch.fx.Node, States] = {}

    def keeps(self, wanted: Collection[int]) -> bool:
        """See :func:`keeps_rows`."""
        for node in self._backward.graph.nodes:
            known: States = None
            if node.op == "placeholder":
                number = self._backward.tangents.get(node)
                known = None if number is None else self._begins.get(number)
            elif node.op == "call_function" and self._reads_gradients(node):
                if self._backward.number(node) is not None:  # a length
                    known = None
                elif node.target is torch.ops.engm.hand_backprops.default:
                    if self.states[node.args[0]] is MIXED:
                        return False
                elif node.target is operator.getitem:
                    results = self.states[node.args[0]]
                    known = results[node.args[1]] if isinstance(results, list) else MIXED
                elif is_operator(node.target) and not schema_of(node.target).is_mutable:
                    known = self._after(node)
                else:  # what it writes into may be read by others
                    return False
            self.states[node] = known
        passed = [self._backward.passed.get(slot) for slot in wanted]
        return all(node is None or isinstance(self.states[node], Tensor | None) for node in passed)

    def _reads_gradients(self, node: torch.fx.Node) -> bool:
        return any(self.states[operand] is not None for operand in node.all_input_nodes)

    def _after(self, node: torch.fx.Node) -> States:
        """What is known of the result of an operator, or of its results."""
        operands: dict[torch.fx.Node, State] = {}
        for operand in node.all_input_nodes:
            state = self.states[operand]
            if not isinstance(state, Tensor | None):
                return MIXED
            operands[operand] = state
        target: Any = node.target
        rule = _RULES.get(schema_of(target).name.partition("::")[2])
        if rule is None and torch.Tag.pointwise in target.tags:
            rule = _apart
        return MIXED if rule is None else rule(_Operator(self._backward, node, operands))


class _Operator:
    """An operator, and what is known of its operands.

    Args:
        backward: the pass that the operator belongs to.
        node: the operator.
        operands: what is known of the nodes that it reads.
    """

    def __init__(self, backward: RegionBackward, node: torch.fx.Node, operands: Mapping[torch.fx.Node, State]) -> None:
        self._backward, self.node, self._operands = backward, node, operands
        self.owners = [state for state in operands.values() if isinstance(state, Tensor)]

    def owners_of(self, number: int) -> Tensor | None:
        """The owners in one operand; None for one in which there is no gradient."""
        operand = self.node.args[number] if number < len(self.node.args) else None
        state = self._operands[operand] if isinstance(operand, torch.fx.Node) else None
        return state if isinstance(state, Tensor) else None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the result."""
        return self._backward.shape_of(self.node)

    def shape_of(self, number: int) -> tuple[int, ...] | None:
        """The shape of one operand."""
        return self._backward.shape_of(self.node.args[number])  # type: ignore[arg-type]

    def shapes(self) -> list[tuple[int, ...] | None]:
        """The shapes of several results; None for what is no tensor."""
        values = self.node.meta["val"]
        found = []
        for value in values:
            lengths = [self._backward.number(length) for length in value.shape] if isinstance(value, Tensor) else [None]
            found.append(None if None in lengths else tuple(lengths))
        return found  # type: ignore[return-value]

    def argument(self, number: int, name: str, default: Any = None) -> Any:
        """An argument, in which numbers are such."""
        given = self.node.args
        value = given[number] if number < len(given) else self.node.kwargs.get(name, default)
        if isinstance(value, list | tuple):
            return [self._plain(one) for one in value]
        return self._plain(value)

    def _plain(self, value: Any) -> Any:
        known = self._backward.number(value)
        return value if known is None else known

    def run(self, most: int | None = None) -> Any:
        """Run the operator on the owners; nobody's are operands without a gradient.

        Args:
            most: how many of the arguments it is given.
        """

        def plain(value: Any) -> Any:
            if not isinstance(value, torch.fx.Node):
                return self._plain(value)
            state = self._operands.get(value)
            if isinstance(state, Tensor):
                return state
            number, shape = self._backward.number(value), self._backward.shape_of(value)
            if shape is not None:
                return torch.zeros((), dtype=torch.int32, device="cpu").expand(shape)
            if number is None:
                raise _UnknownError
            return number

        args = [
            [plain(one) for one in value] if isinstance(value, list | tuple) else plain(value)
            for value in self.node.args
        ]
        return self.node.target(*args[:most])  # type: ignore[operator]


class _UnknownError(Exception):
    """A number hangs on the data."""


# -- owners -----------------------------------------------------------------------------------------------------------


def _whole(owners: Tensor, shape: Sequence[int]) -> Tensor:
    """The owners ``[*leading]`` of rows for every element of a tensor."""
    return owners.to(torch.int32).view(*owners.shape, *[1] * (len(shape) - owners.dim())).expand(tuple(shape))


def _alike(owners: Tensor, dims: Collection[int]) -> State:
    """The owners, with length 1 along some dimensions; MIXED if they differ along these."""
    for dim in dims:
        if owners.stride(dim) == 0 and owners.shape[dim] > 1:
            owners = owners.narrow(dim, 0, 1)
    varying = [dim for dim in dims if owners.shape[dim] != 1]
    if not varying:
        return owners
    if not owners.numel():
        return MIXED
    one = owners.amax(varying, keepdim=True)
    return one if bool(((owners == one) | (owners == 0)).all()) else MIXED


def _agreed(found: Sequence[State], shape: tuple[int, ...] | None) -> State:
    """The owners of what is computed element by element, from operands that broadcast to a shape."""
    if shape is None:
        return MIXED
    agreed: Tensor | None = None
    for owners in found:
        if owners is None:
            continue
        if not isinstance(owners, Tensor):
            return MIXED
        if agreed is None or agreed is owners:
            agreed = owners
            continue
        one, other = torch.broadcast_tensors(agreed, owners)
        for dim in range(one.dim()):
            if one.stride(dim) == 0 and other.stride(dim) == 0 and one.shape[dim] > 1:
                one, other = one.narrow(dim, 0, 1), other.narrow(dim, 0, 1)
        if bool(((one != other) & (one != 0) & (other != 0)).any()):
            return MIXED
        agreed = torch.maximum(one, other)
    if agreed is None:
        return None
    return agreed.expand(shape) if torch.broadcast_shapes(agreed.shape, shape) == shape else MIXED


def _dims(given: Any, rank: int) -> list[int]:
    """Dimensions as numbers that are not negative; all, if none are given."""
    dims = [given] if isinstance(given, int) else list(given or range(rank))
    return [dim % max(rank, 1) for dim in dims if rank]


# -- rules ------------------------------------------------------------------------------------------------------------


def _apart(applied: _Operator) -> States:
    """Every element is treated apart."""
    return _agreed(applied.owners, applied.shape)


def _independent(applied: _Operator) -> States:
    """The shape of an operand is all that is read of it."""
    return None


def _moved(applied: _Operator) -> States:
    """Elements come to lie elsewhere, by arguments alone."""
    try:
        found = applied.run()
    except _UnknownError:
        return MIXED
    return list(found) if isinstance(found, list | tuple) else found


def _padded(applied: _Operator) -> States:
    """Something is put around a tensor, which is nobody's whatever it is."""
    try:
        found: Tensor = applied.run(2)
    except _UnknownError:
        return MIXED
    return found


def _viewed(applied: _Operator) -> States:
    """The same elements in another shape."""
    owners, shape = applied.owners[0], applied.shape
    if shape is None or prod(shape) != owners.numel():
        return MIXED
    rest: list[int] = []  # the last dimensions, if they stay
    while owners.dim() > 1 and len(shape) > 1 and shape[-1] == owners.shape[-1] and owners.stride(-1) == 0:
        owners, rest, shape = owners.select(-1, 0), [shape[-1], *rest], shape[:-1]
    return _whole(owners.reshape(shape), (*shape, *rest))


def _reduced(applied: _Operator) -> States:
    """What lies along some dimensions is combined, and they go or have length 1."""
    owners, shape = applied.owners[0], applied.shape
    one = _alike(owners, _dims(applied.argument(1, "dim"), owners.dim()))
    return one.reshape(shape) if isinstance(one, Tensor) and shape is not None else MIXED


def _along(dim: int, name: str = "dim") -> Callable[[_Operator], States]:
    """What lies along one dimension, given as argument number ``dim``, is combined, and may have another length."""

    def rule(applied: _Operator) -> States:
        owners, shape, along = applied.owners_of(0), applied.shape, applied.argument(dim, name)
        if owners is None or len(applied.owners) > 1 or shape is None or not isinstance(along, int):
            return MIXED
        one = _alike(owners, _dims(along, owners.dim()))
        alike = len(shape) == owners.dim() and all(
            a == b or other in _dims(along, len(shape))
            for other, (a, b) in enumerate(zip(shape, owners.shape, strict=True))
        )
        return one.expand(shape) if isinstance(one, Tensor) and alike else MIXED

    return rule


def _scattered(applied: _Operator) -> States:
    """Elements are written, along one dimension, to places that the data tell."""
    shape, where, along = applied.shape, applied.shape_of(2), applied.argument(1, "dim")
    into, source = applied.owners_of(0), applied.owners_of(3)
    if shape is None or where is None or not shape:
        return MIXED
    along = along % len(shape)
    if any(a != b for dim, (a, b) in enumerate(zip(shape, where, strict=True)) if dim != along):
        return MIXED
    found: list[State] = [into]
    if source is not None:
        if any(a != b for dim, (a, b) in enumerate(zip(source.shape, where, strict=True)) if dim != along):
            return MIXED
        found.append(_alike(source, [along]))
    return _agreed(found, shape)


def _multiplied(first: int) -> Callable[[_Operator], States]:
    """Two matrices, or stacks of them, are multiplied: arguments ``first`` and the next; one in front is added."""

    def rule(applied: _Operator) -> States:
        left, right = applied.owners_of(first), applied.owners_of(first + 1)
        found: list[State] = [] if first == 0 else [applied.owners_of(0)]
        if left is not None:
            found.append(_alike(left, [left.dim() - 1]))
        if right is not None:
            found.append(_alike(right, [right.dim() - 2]))
        return _agreed(found, applied.shape)

    return rule


def _by_rows(*outputs: int, kept: Callable[[_Operator], int] = lambda applied: 1) -> Callable[[_Operator], States]:
    """Rows are told by the leading dimensions of the first operand; what lies in a row is combined anyhow.

    Args:
        outputs: which of the results, if there are several, have the same rows; the others have sums over the rows.
        kept: how many leading dimensions.
    """

    def rule(applied: _Operator) -> States:
        owners, leading = applied.owners_of(0), kept(applied)
        if owners is None or len(applied.owners) > 1 or owners.dim() < leading:
            return MIXED
        one = _alike(owners, range(leading, owners.dim()))
        if not isinstance(one, Tensor):
            return MIXED
        rows = one.reshape(one.shape[:leading])

        def of(shape: tuple[int, ...] | None) -> State:
            return _whole(rows, shape) if shape is not None and shape[:leading] == tuple(rows.shape) else MIXED

        if not outputs:
            return of(applied.shape)
        return [of(shape) if number in outputs else MIXED for number, shape in enumerate(applied.shapes())]

    return rule


def _not_normalized(applied: _Operator) -> int:
    """The dimensions that a layer norm leaves apart."""
    owners = applied.owners_of(0)
    return 0 if owners is None else owners.dim() - len(applied.argument(2, "normalized_shape"))


def _of_each(rule: Callable[[_Operator], States], number: int, name: str) -> Callable[[_Operator], States]:
    """A rule of a loss's backward pass, which holds if the losses were not reduced (argument ``number`` is 0)."""
    return lambda applied: rule(applied) if applied.argument(number, name) == 0 else MIXED


def _batch_norm(applied: _Operator) -> States:
    """The backward pass of a batch norm, which treats every element apart if it took no statistics from the batch."""
    if applied.argument(7, "train") is not False or len(applied.owners) > 1:
        return MIXED
    return [applied.owners_of(0), MIXED, MIXED]


_RULES: dict[str, Callable[[_Operator], States]] = {
    **dict.fromkeys(
        names_of(
            """
            alias clone convert_element_type copy detach elu_backward hardshrink_backward hardsigmoid_backward
            hardswish_backward hardtanh_backward leaky_relu_backward lift_fresh_copy log_sigmoid_backward masked_fill
            mish_backward native_dropout_backward softplus_backward softshrink_backward _to_copy
            """
        ),
        _apart,
    ),
    **dict.fromkeys(
        names_of(
            """
            cat chunk diagonal diagonal_backward expand flip movedim permute pixel_shuffle pixel_unshuffle
            repeat roll select select_backward select_scatter slice slice_backward slice_scatter split
            split_with_sizes squeeze stack t transpose tril triu unbind unsqueeze
            """
        ),
        _moved,
    ),
    **dict.fromkeys(
        names_of("empty_like full_like ones_like zeros_like new_empty new_full new_ones new_zeros"), _independent
    ),
    **dict.fromkeys(names_of("view _unsafe_view reshape"), _viewed),
    **dict.fromkeys(names_of("sum mean amax amin logsumexp any all"), _reduced),
    **dict.fromkeys(names_of("_softmax _log_softmax cumsum cumprod gather"), _along(1)),
    **dict.fromkeys(names_of("_softmax_backward_data _log_softmax_backward_data"), _along(2)),
    **dict.fromkeys(names_of("scatter scatter_add scatter_reduce"), _scattered),
    **dict.fromkeys(names_of("mm bmm"), _multiplied(0)),
    **dict.fromkeys(names_of("addmm baddbmm"), _multiplied(1)),
    **dict.fromkeys(names_of("convolution_backward native_group_norm_backward"), _by_rows(0)),
    **dict.fromkeys(
        names_of(
            """
            max_pool2d_with_indices_backward max_pool3d_with_indices_backward avg_pool2d_backward
            avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward
            adaptive_max_pool2d_backward adaptive_max_pool3d_backward upsample_nearest1d_backward
            upsample_nearest2d_backward upsample_nearest3d_backward upsample_linear1d_backward
            upsample_bilinear2d_backward upsample_bicubic2d_backward upsample_trilinear3d_backward
            reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward
            replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward
            """
        ),
        _by_rows(),
    ),
    **dict.fromkeys(
        names_of(
            """
            _scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_flash_attention_backward
            _scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward
            """
        ),
        _by_rows(0, 1, 2),
    ),
    **dict.fromkeys(names_of("nll_loss_backward nll_loss2d_backward"), _of_each(_by_rows(), 4, "reduction")),
    **dict.fromkeys(
        names_of("huber_loss_backward mse_loss_backward smooth_l1_loss_backward"), _of_each(_apart, 3, "reduction")
    ),
    "binary_cross_entropy_backward": _of_each(_apart, 4, "reduction"),
    "constant_pad_nd": _padded,
    "native_layer_norm_backward": _by_rows(0, kept=_not_normalized),
    "_fused_rms_norm_backward": _by_rows(0, kept=_not_normalized),
    "native_batch_norm_backward": _batch_norm,
}
