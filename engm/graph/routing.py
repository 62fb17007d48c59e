"""What a plan depends on: the structure of a graph, and the values by which its nodes route rows.

Most operators treat the rows of the examples alike whatever their operands hold, so graphs of one structure have one
plan. Some move rows by indices, masks or orders; there a plan holds for graphs with the same values alone. And where
examples are kept apart by zeros alone (a block-diagonal adjacency or attention mask) no comparison of values is cheap:
such graphs are measured at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import replace
from enum import Enum
from math import prod
from types import BuiltinFunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..rules.entries import names_of
from ..terms.layout import PLAIN
from ..terms.owners import Ownership
from ..torch_internals import (
    Node,
    attributes_of_function,
    entering_shape,
    is_compiled_region,
    is_opaque,
    is_python_function,
    node_outputs,
    operator_name,
    options_reader,
    output_shape,
    passed_to_input,
    saved_by,
    saved_option,
    saved_options,
    saved_tensor_names,
    saved_tensors_of,
    saves_data,
    unrecorded,
    written_slice,
)
from .arrangement import Arrangements
from .owners import PICKING
from .plan import Route
from .regions import keeps_rows
from .structure import Structure
from .trace import Trace

# Operators that treat every element apart.
ELEMENTWISE = names_of(
    """
    Abs Acos Acosh Add Addcdiv Addcmul Alias Angle Asin Asinh Atan Atan2 Atanh BinaryCrossEntropy
    BinaryCrossEntropyWithLogits Ceil Celu Clamp ClampMax ClampMin Clone Conj Copy Cos Cosh CudnnBatchNorm Deg2Rad
    Digamma Div Elu Erf Erfc Erfinv Exp Exp2 Expm1 Floor Fmod Frac FusedDropout Gelu Hardshrink Hardsigmoid
    Hardswish Hardtanh HuberLoss Hypot I0 Imag KlDiv LeakyRelu Leaky_Relu Lerp Lgamma Log Log10 Log1P Log2
    LogSigmoid Logaddexp Logaddexp2 Logit MaskedFill Maximum Minimum MiopenBatchNorm Mish MseLoss Mul NanToNum
    NativeBatchNorm NativeDropout Neg Positive Pow PreluKernel Rad2Deg Real Reciprocal Relu Relu6 Remainder Round
    RreluWithNoise Rsqrt Rsub Selu Sgn Sigmoid Sign Silu Sin Sinc Sinh SmoothL1Loss SoftMarginLoss Softplus
    Softshrink Sqrt Square Sub Tan Tanh Threshold ToCopy Trunc ViewAsComplex ViewAsReal Where Xlogy
    """
)

# So do their backward passes, which are operators where the loss is made of gradients.
ELEMENTWISE |= names_of(
    """
    BinaryCrossEntropyBackward EluBackward GeluBackward HardshrinkBackward HardswishBackward HardtanhBackward
    HuberLossBackward LeakyReluBackward LogSigmoidBackward MseLossBackward PreluKernelBackward RreluWithNoiseBackward
    SigmoidBackward SmoothL1LossBackward SoftMarginLossBackward SoftplusBackward SoftshrinkBackward TanhBackward
    ThresholdBackward
    """
)

# Operators that combine elements of a row, or rows of an operand's dimension with each other, whatever else they do.
COMBINING = names_of(
    """
    AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Addmm Addmv Addr AvgPool2D AvgPool3D
    Baddbmm Bmm Convolution ConvolutionOverrideable CudnnConvolution Dot FusedRmsNorm GridSampler2D
    LinearCrossEntropy MaxPool2DWithIndices MaxPool3DWithIndices MiopenConvolution MkldnnAdaptiveAvgPool2D
    MkldnnConvolution MkldnnLinear MkldnnMaxPool2D Mm Mv NativeGroupNorm NativeLayerNorm
    ScaledDotProductAttentionMath ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention
    ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu T Tap ThnnConv2D UpsampleBicubic2D
    UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D
    UpsampleNearestExact2D UpsampleTrilinear3D WeightNormInterface
    """
)

# Operators without arguments by which rows could come to lie elsewhere, besides shapes, which are compared elsewhere,
# and the options in :data:`DECIDING`.
FIXED = ELEMENTWISE | COMBINING

# The options of such operators that decide which rows they combine. No other one does: some are numbers that a gradient
# is multiplied by, and others say how elements are combined within rows, or within what a plan that is kept takes for
# rows of one example, see :func:`_mixes`.
DECIDING = {
    **dict.fromkeys(["NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"], ("training",)),
    **dict.fromkeys(["NativeLayerNorm", "FusedRmsNorm"], ("normalized_shape",)),
    "NativeGroupNorm": ("N", "C", "group"),
    "WeightNormInterface": ("dim",),
}

# Operators whose backward pass gives every element of the input to at most one element of the output, or the other way
# round, by their arguments alone: they mix nothing.
MOVING = names_of(
    """
    Amax Amin Cat Chunk ConstantPadNd CopySlices DiagEmbed Diagonal Embedding Flip Gather Glu Index IndexAdd
    IndexCopy IndexFill IndexPut IndexPutImpl IndexReduce IndexSelect Kthvalue LinalgVectorNorm LinearCrossEntropy
    Logsumexp MaskedScatter MaskedSelect Max Mean Median Min Mode Movedim Nanmedian Nansum Narrow NllLoss NllLoss2D
    NllLossNd Norm PackPaddedSequence Permute PixelShuffle PixelUnshuffle Prod ReshapeAlias Roll Rot90 Scatter
    ScatterAdd ScatterReduce SegmentReduce Select Slice Sort Split SplitWithSizes Squeeze Stack Std StdMean Sum T
    Take Tap Topk Transpose Tril Triu Unbind UnsafeIndex UnsafeView Unsqueeze Var VarMean View WeightNormInterface
    """
)

# Those of them whose data tell, and nothing that is saved as indices, which rows get a gradient.
CHOOSING = frozenset(["Amax", "Amin", "LinalgVectorNorm", "Max", "Median", "Min", "Nanmedian", "Norm", "Prod"])

# Functions in Python, ours and those of fully_shard, that hand on what they are given.
HANDING_ON = frozenset(["Tap", "RegisterPostBackwardFunction"])

LARGEST = 2  # the mode of a bag that takes the largest elements

# Operators that treat what lies along the first dimension of their output apart, unless that is all there is to it.
BY_FIRST = frozenset(["NativeGroupNorm", "MkldnnLinear", "EmbeddingBag"])

# Operators whose indices tell rows of their output.
INTO = frozenset(
    ["IndexAdd", "IndexCopy", "IndexPut", "IndexPutImpl", "IndexReduce", "Scatter", "ScatterAdd", "ScatterReduce"]
)

# Operators that take an index, or a mask, for each of some dimensions.
BY_INDICES = frozenset(["Index", "IndexPut", "IndexPutImpl", "UnsafeIndex"])

MASKS = (torch.bool, torch.uint8)  # the types of indices that are masks

# Operators that move rows by what they tell nobody: the lengths of sequences.
HIDING = frozenset(["NestedViewFromJagged", "NestedFromPadded", "ToPaddedTensor"])

# Operators that may write into a part of a tensor: each element goes where it goes, whatever the numbers are.
WRITING = frozenset(["Add", "CopyBackwards", "Fill", "Sub", "Zero"])

# Operators that multiply matrices: which input has its rows added up, whatever the other one is.
RIGHT = {"Mm": 1, "Addmm": 2, "Mv": 1, "Addmv": 2, "Cdist": 1, "EuclideanDist": 1}

# The same for stacks of matrices.
RIGHT_OF_STACKS = {"Bmm": 1, "Baddbmm": 2}

# Those of them whose columns are the other operand's times a matrix.
PRODUCTS = frozenset(["Mm", "Addmm", "Bmm", "Baddbmm"])

# Operators whose output has a dimension at the end that their input lacks, or the other way round.
PARTS = frozenset(["ViewAsReal", "ViewAsComplex"])

# Operators that move elements along a dimension that they are told, each by an index of its own.
BY_ELEMENT = frozenset(["Gather", "Scatter", "ScatterAdd", "ScatterReduce", "Sort", "Topk"])

# Operators whose output may have the elements of one row in several.
SPLITTING = BY_ELEMENT | names_of(
    """
    Chunk CopySlices Diagonal Index IndexPut IndexPutImpl IndexSelect MaskedScatter MaskedSelect Movedim Permute
    PixelShuffle PixelUnshuffle ReshapeAlias Split SplitWithSizes Squeeze T Take Transpose Unbind UnsafeIndex
    UnsafeView Unsqueeze View
    """
)

# Operators that combine what lies along the dimension that they are told.
ALONG = names_of(
    """
    Cummax Cummin Cumprod Cumsum FftC2C FftC2R FftR2C GluBackward LinalgCross LogSoftmax LogSoftmaxBackwardData
    Logcumsumexp Softmax SoftmaxBackwardData Unfold
    """
)

# Operators that may combine what lies along any dimension.
ANYHOW = frozenset(["AsStrided", "AsStridedScatter", "Renorm"])

Owners = Mapping[tuple[int, int], Tensor]


class HashedOnce:
    """Something whose hash takes long, and is asked for several times.

    Args:
        value: does not change.
    """

    __slots__ = ("_hash", "value")

    def __init__(self, value: Hashable) -> None:
        self.value = value
        self._hash = hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HashedOnce) and self._hash == other._hash and self.value == other.value


def skeleton_of(traced: Trace, n: int) -> Hashable:
    """What tells in which nodes rows and parameters are, whatever lies in them: nodes, edges, calls, leaves, modes.

    All trained parameters count, since a function of the user's may hide some of them from the graph. How many examples
    there are does not, but for a single one, which shares nothing with others.
    """
    calls = tuple([(id(c.module), id(c.rule), c.couples, len(c.parameters), c.output_nr) for c in traced.calls])
    edges = tuple(traced.children), tuple(traced.numbers), traced.number
    trained = tuple([id(parameter) for _, parameter in traced.trained])
    # Trained parameters are known by identity, all else, which may be new at every step, by its place.
    own = set(trained)
    leaves = tuple([k if k in own else isinstance(leaf, nn.Parameter) for k, leaf in traced.leaves.items()])
    return HashedOnce((n == 1, traced.kinds, edges, calls, leaves, trained))


def signature_of(traced: Trace, skeleton: Hashable, n: int) -> Hashable:
    """What a plan depends on besides the values of routes: the graph's skeleton, options, shapes, number of examples.

    These are the things themselves and not their hashes, which are the same for -1 and -2.
    """
    options: list[Hashable] = []
    shapes, order = traced.shapes, traced.order
    for position, kind in enumerate(traced.kinds):
        if kind not in _READERS:
            if len(_READERS) >= MOST_READERS:  # of functions that are defined anew at every step
                _READERS.clear()
            _READERS[kind] = _reader(order[position])
        read = _READERS[kind]
        if not (read is None or (read is _options_of_view and None not in shapes[position])):
            options.append(read(order[position]))
    calls = tuple([(call.shape, call.options) for call in traced.calls])
    leaves = tuple([leaf.shape for leaf in traced.leaves.values()])
    inputs = tuple([capture.input_shape for capture in traced.own_captures])
    try:
        return HashedOnce((skeleton, n, tuple(shapes), tuple(options), calls, leaves, inputs))
    except TypeError:  # somebody set an option of a layer to a list
        return HashedOnce((skeleton, n, tuple(shapes), tuple(options), _comparable(calls), leaves, inputs))


# Types whose values do not change: numbers, names, functions and types themselves.
_CONSTANTS = (
    *(bool, int, float, complex, str, bytes, range, Enum, type, BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)

MOST_READERS = 4096
_READERS: dict[type, Callable[[Node], Hashable] | None] = {}  # of the arguments by which rows may come to lie elsewhere


def _reader(node: Node) -> Callable[[Node], Hashable] | None:
    if is_compiled_region(node):
        return None
    if is_python_function(node):
        return None if operator_name(node) in HANDING_ON else _options_of_function
    name = operator_name(node)
    if name in FIXED:
        return options_reader(node, DECIDING[name]) if name in DECIDING else None
    if name == "Cat":
        return _options_of_cat
    if name == "CopySlices":
        return written_slice
    if name in ("View", "UnsafeView", "ReshapeAlias", "Expand"):
        return _options_of_view
    options = options_reader(node)
    if name in ("Repeat", "Squeeze"):
        return lambda node: (options(node), output_shape(node))
    if name == "AsStrided":
        return lambda node: (options(node), hands_on(node))
    return options


def _options_of_view(node: Node) -> Hashable:
    """The two shapes, which are all that there is to know."""
    return saved_options(node), output_shape(node)


def _options_of_cat(node: Node) -> Hashable:
    """Where in the output each input lies, although those without a gradient tell the node nothing of their length."""
    output, edges = node_outputs(node)[0], node.next_functions
    if output.is_nested_tensor:
        return saved_options(node)
    dim, shape = cast(int, saved_option(node, "dim")), output_shape(node)
    lengths = tuple(None if edge[0] is None else entering_shape(*edge) for edge in edges)
    if lengths.count(None) < 2:  # the other lengths tell that of one
        return dim, lengths, shape
    along = _dimension(dim, len(shape))
    numbered = torch.empty(shape[along], dtype=output.dtype, device="meta").view(-1, *[1] * (len(shape) - along - 1))
    parts = (
        passed_to_input(node, slot, [numbered.expand(shape)])
        for slot, length in enumerate(lengths)
        if length is not None
    )
    return dim, lengths, shape, tuple(None if part is None else part.storage_offset() for part in parts)


def _options_of_function(node: Node) -> Hashable:
    """What a user's own function keeps besides tensors, as far as it can be compared."""
    options: list[Hashable] = []
    for name, value in sorted(attributes_of_function(node).items()):
        try:
            options.append((name, _comparable(value)))
        except TypeError:
            options.append((name, type(value)))
    return tuple(options)


def _comparable(value: Any) -> Hashable:
    """A value that is equal to another as long as neither can have changed.

    Raises:
        TypeError: the value may hold things that change without being another: a tensor, an array, an object of the
            user's.
    """
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_comparable, value))
    if isinstance(value, dict):
        return dict, tuple((_comparable(key), _comparable(item)) for key, item in value.items())
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(_comparable, value))
    if value is None or isinstance(value, _CONSTANTS):
        return type(value), value
    raise TypeError(type(value))


def routes_of(
    traced: Trace, structure: Structure, owners: Owners, skip: Collection[int], about: Arrangements
) -> tuple[list[Route], bool]:
    """The values that the rows of the examples are routed by, and whether comparing those is enough.

    Args:
        traced: the graph.
        structure: what it tells by itself.
        owners: of the outputs of nodes, where they were measured.
        skip: nodes (positions) and leaves (numbers) through which nothing of the examples goes: shared ones, those
            without a gradient, parameters.
        about: tells how the examples lie in them.
    """
    routes: list[Route] = []
    for position, node in enumerate(traced.order):
        if position in skip or position in structure.inner:
            continue
        if is_compiled_region(node):  # has layers inside, whatever is behind it
            if not _treats_rows_alike(traced, position, owners, skip, about):
                return [], False
            continue
        name = operator_name(node)
        behind = [child for child in traced.children[position] if child is not None and child not in skip]
        if not behind or name in HANDING_ON:
            continue
        if None in traced.shapes[position]:  # rows of lengths that are not compared
            return [], False
        if name in HIDING or (is_opaque(node) and not _stays(position, behind, owners, about)):
            return [], False
        if name == "CopySlices" and not _writes_rows(traced, position, skip):
            return [], False
        if is_python_function(node):
            if not name.startswith("SyncBatchNorm"):
                if _hides_values(node) or saves_data(node):
                    return [], False
                routes += _routes_of_node(position, node)
        elif name not in FIXED:
            found = list(_routes_of_node(position, node))
            routes += [route for route in found if _moves_rows(route, node, name, behind, owners, about)]
        apart = name in ELEMENTWISE or name in MOVING or is_python_function(node)  # the last is watched at every step
        if not apart and _mixes(traced, position, name, owners, skip, about):
            return [], False
        if name in ELEMENTWISE and _spreads(traced, position, owners, skip, about):
            return [], False
    # The tensors are the network's, which may write into them before the next step.
    return [replace(route, values=route.values.clone()) for route in routes], True


def _treats_rows_alike(
    traced: Trace, position: int, owners: Owners, skip: Collection[int], about: Arrangements
) -> bool:
    """Whether the code of a compiled region tells that rows are whose they are now in every graph like this one."""
    read = {
        node.next_functions[slot][1]
        for node, children in zip(traced.order, traced.children, strict=True)
        for slot, child in enumerate(children)
        if child == position
    }
    given: dict[int, Ownership | None] = dict.fromkeys(read)
    for number in read:
        own = owners.get((position, number))
        if own is not None and (about.regular(own) or not (about.present(own).nobody or about.present(own).several)):
            given[number] = about.arranged(own).ownership
    if position == len(traced.order) - 1:
        given[traced.number] = PLAIN
    wanted = [slot for slot, child in enumerate(traced.children[position]) if child is not None and child not in skip]
    return keeps_rows(traced.order[position], given, wanted, about.n)


def _hides_values(node: Node) -> bool:
    """Whether a user's own function keeps something by which it may move rows, and which cannot be compared."""
    try:
        for value in attributes_of_function(node).values():
            _comparable(value)
    except TypeError:
        return True
    return False


def _routes_of_node(position: int, node: Node) -> Iterator[Route]:
    for name in saved_tensor_names(node):
        for number, values in enumerate(saved_tensors_of(node, name)):
            if values is not None and not values.is_floating_point() and not values.is_complex():
                yield Route(position, name, number, values)


def _moves_rows(
    route: Route, node: Node, name: str, behind: Collection[int], owners: Owners, about: Arrangements
) -> bool:
    """Whether indices pick among rows of several examples."""
    found = [owners.get((child, 0)) for child in behind]
    if name in INTO:
        found.append(owners.get((route.position, 0)))
    shapes = [entering_shape(*edge) for edge in node.next_functions if edge[0] is not None]
    ranks = {len(shape) for shape in shapes}
    along: Any = _indexed_by(route, node) if name in BY_INDICES else saved_option(node, "dim")
    if name.startswith("NllLoss"):  # classes are along the last dimension, or the one after that of the examples
        along = min(1, max(ranks) - 1)
    if not isinstance(along, int) or route.values.dtype in MASKS:  # a mask is of several dimensions
        return True
    return any(own is None or _dimension(along, rank) in about.varying(own) for own in found for rank in ranks)


def _indexed_by(route: Route, node: Node) -> int:
    """The dimension that one of several indices is for; a mask in front of it is for as many as it has itself."""
    before = saved_tensors_of(node, route.name)[: route.number]
    return sum(index.dim() if index is not None and index.dtype in MASKS else 1 for index in before)


def _stays(position: int, behind: Collection[int], owners: Owners, about: Arrangements) -> bool:
    """Whether the examples lie in the same regular order before and behind a node that shows nothing of itself."""
    found = [owners.get((other, 0)) for other in (position, *behind)]
    lengths = {None if own is None or not about.regular(own) else own.shape[0] for own in found}
    return len(lengths) == 1 and None not in lengths


def _dimension(dim: int, rank: int) -> int:
    """A dimension as a number that is not negative, which nodes keep as torch got it."""
    return dim % max(rank, 1)


def _mixes(traced: Trace, position: int, name: str, owners: Owners, skip: Collection[int], about: Arrangements) -> bool:
    """Whether an operator may combine rows of different examples, so that zeros alone would keep them apart."""
    own = owners.get((position, 0))
    if own is None:
        return False
    if name in RIGHT or name in RIGHT_OF_STACKS:
        slot = (RIGHT | RIGHT_OF_STACKS)[name]
        left, right = (_owned_operand(traced, position, k, owners, skip) for k in (slot - 1, slot))
        rows = len(output_shape(traced.order[position])) - 2  # the dimension of rows, behind which that of columns is
        stacked = set(range(rows))
        if not right:  # a shared matrix on the right takes rows to rows
            return bool(about.varying(own) - {*stacked, rows}) if name in RIGHT_OF_STACKS else 1 in about.varying(own)
        child = traced.children[position][slot]
        if left or child is None or name in ("Mv", "Addmv"):
            return name in RIGHT or bool(about.varying(own) - stacked)
        # One on the left takes columns to columns; a distance's columns are the other operand's rows.
        given, across = owners.get((child, 0)), rows + (name in PRODUCTS)
        return given is None or not (
            about.varying(own) <= {*stacked, rows + 1} and about.varying(given) <= {*stacked, across}
        )
    if name in ("Expand", "Repeat"):
        return _spreads(traced, position, owners, skip, about)
    differs = about.varying(own)
    if name == "LinalgSolveEx" and _solves_columns(traced, position, owners, skip):
        rank = len(output_shape(traced.order[position]))
        return rank - 2 in differs
    if name in ANYHOW:
        return bool(differs) and not hands_on(traced.order[position])
    if name in ALONG:
        node = traced.order[position]
        dim: Any = saved_option(node, "dimension" if name == "Unfold" else "dim")
        dims = dim if isinstance(dim, tuple | list) else (dim,)
        rank = next(len(entering_shape(*edge)) for edge in node.next_functions if edge[0] is not None)
        return any(_dimension(d, rank) in differs for d in dims)
    if name in ("NativeLayerNorm", "NativeLayerNormBackward", "FusedRmsNorm"):
        rank = len(output_shape(traced.order[position]))
        return any(dim >= rank - len(saved_option(traced.order[position], "normalized_shape")) for dim in differs)
    if name == "EmbeddingBag" and _owned_operand(traced, position, 0, owners, skip):
        node = traced.order[position]
        if saved_by(node, "per_sample_weights") is not None or saved_option(node, "mode") == LARGEST:
            return True  # rows that count nothing now may count at the next step
    first = {0} if name in BY_FIRST or len(output_shape(traced.order[position])) > 2 else set()
    return bool(differs - first)


def _solves_columns(traced: Trace, position: int, owners: Owners, skip: Collection[int]) -> bool:
    """Whether a node solves equations for each column by itself, by matrices that are not the examples'."""
    node = traced.order[position]
    matrix, solution = saved_by(node, "A"), output_shape(node)
    if matrix is None or matrix.dim() != len(solution) or not saved_option(node, "left"):
        return False
    return not _owned_operand(traced, position, 0, owners, skip)


def _owned_operand(traced: Trace, position: int, slot: int, owners: Owners, skip: Collection[int]) -> bool:
    """Whether what a node reads there is of the examples."""
    child = traced.children[position][slot]
    return child is not None and child not in skip and (child < 0 or (child, 0) in owners)


def _writes_rows(traced: Trace, position: int, skip: Collection[int]) -> bool:
    """Whether a node that wrote into a part of a tensor tells where to, and repeats nothing of the examples there."""
    node = traced.order[position]
    written = written_slice(node)
    if written is None or written.operator not in WRITING:
        return False
    read = zip(traced.children[position][1:], node.next_functions[1:], strict=True)  # the first is the tensor itself
    return all(child is None or child in skip or entering_shape(*edge) == written.view.shape for child, edge in read)


def hands_on(node: Node) -> bool:
    """Whether ``as_strided`` tells no more than the memory that its input has: a pooling of channels-last images does.

    The strides of the input are not to be seen, but where an element's gradient goes is.
    """
    given = entering_shape(*node.next_functions[0]) if operator_name(node) == "AsStrided" else None
    if given is None or given != output_shape(node):
        return False
    with unrecorded():
        numbers = torch.arange(prod(given), dtype=torch.float64, device="cpu").view(given)
        passed = passed_to_input(node, 0, [numbers])
        return passed is not None and torch.equal(passed, numbers)


def repeats_rows(traced: Trace, position: int, skip: Collection[int]) -> bool:
    """Whether a row that a node reads may come up in several rows of its output, as a whole or in parts."""
    node = traced.order[position]
    name = operator_name(node)
    if _spreads_last(node) or (name in SPLITTING and not _keeps_rows(node, name)):
        return True
    if name in PICKING:
        ones = torch.ones(output_shape(node), dtype=node_outputs(node)[0].dtype, device=node_outputs(node)[0].device)
        slot = next(slot for slot, (child, _) in enumerate(node.next_functions) if child is not None)
        given = passed_to_input(node, slot, [ones])
        return given is not None and bool((given.to_dense().abs() > 1).any())
    if name in ELEMENTWISE or name in ("Expand", "Repeat"):
        return bool(_repeated(traced, position, skip))
    return name not in MOVING and name not in HANDING_ON and not hands_on(node)


def _spreads_last(node: Node) -> bool:
    """Whether the last dimension of what a node reads is the only one of its output, of which each element is a row."""
    shape = output_shape(node)
    given = [entering_shape(*edge) for edge in node.next_functions if edge[0] is not None]
    if len(shape) != 1 or not any(len(one) > 1 and one[-1] == shape[0] for one in given):
        return False
    dims = told_dims(node)  # along which it reduces, or picks
    return not any(isinstance(dim, int) and _dimension(dim, len(one)) == len(one) - 1 for one in given for dim in dims)


def told_dims(node: Node, name: str = "dim") -> tuple[Any, ...]:
    """The dimensions that a node was told under a name, as they were told; none if it was told none."""
    along = saved_option(node, name)
    return along if isinstance(along, tuple) else () if along is None else (along,)


def _keeps_rows(node: Node, name: str) -> bool:
    """Whether what lies along the last dimension of a node's inputs does so in its output."""
    given, shape = [entering_shape(*edge) for edge in node.next_functions if edge[0] is not None], output_shape(node)
    last = len(given[0]) - 1
    if name in BY_ELEMENT or name in ("Split", "SplitWithSizes", "Chunk", "Unbind"):
        along: Any = saved_option(node, "dim")
        return isinstance(along, int) and (_dimension(along, last + 1) == last) == (name in BY_ELEMENT)
    if name == "Permute":
        dims: Any = saved_option(node, "dims")
        return not dims or _dimension(dims[-1], last + 1) == last
    if name == "Transpose":
        return all(_dimension(cast(int, saved_option(node, dim)), last + 1) != last for dim in ("dim0", "dim1"))
    if name == "CopySlices":
        written = written_slice(node)
        if written is None:
            return False
        base, view = written.base, written.view
        return base.shape[-1:] == view.shape[-1:] and base.strides[-1:] == view.strides[-1:]
    return name != "T" and all(one[-1:] == shape[-1:] for one in given)


def _spreads(traced: Trace, position: int, owners: Owners, skip: Collection[int], about: Arrangements) -> bool:
    """Whether an operand is repeated along a dimension along which the owners differ."""
    own = owners.get((position, 0))
    if own is None:
        return False
    along = _repeated(traced, position, skip)
    return bool(along) and bool(along & about.varying(own))


def _repeated(traced: Trace, position: int, skip: Collection[int]) -> set[int]:
    """The dimensions of a node's output along which an operand is repeated."""
    node = traced.order[position]
    shape = output_shape(node)
    found: set[int] = set()
    for slot, child in enumerate(traced.children[position]):
        if child is None or child in skip:
            continue
        given = entering_shape(*node.next_functions[slot])
        rank = min(len(given), len(shape))
        if given == shape or (operator_name(node) in PARTS and given[:rank] == shape[:rank]):
            continue
        aligned = (1,) * (len(shape) - len(given)) + given
        found |= {dim for dim, (a, s) in enumerate(zip(aligned, shape, strict=False)) if a != s}
    return found
