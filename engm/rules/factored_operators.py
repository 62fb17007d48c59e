"""How single operators hand on per-example gradients that are kept in parts, see :mod:`engm.rules.in_factors`.

A rule takes the operator's node, which of its inputs is asked for, the parts of the gradients of its output, and the
shapes of output and input. It returns the parts of the gradients of the input, or None where these are not known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..ops import accumulation_dtype
from ..terms import PerExampleGradient, Reshaped
from ..terms.combination import sum_of
from ..terms.matrix_parts import moved_along, of_exponential, of_left, of_reflections, of_right, transposes
from ..terms.parts import Part, Product, Scaled, is_constant
from ..torch_internals import (
    entering_shape,
    node_outputs,
    operator_name,
    saved_by,
    saved_option,
    saved_tensors_of,
)
from .entries import names_of

# Operators that hand on a gradient as it is, in a shape that may have other dimensions of one element.
SAME = names_of("Alias Clone ReshapeAlias Squeeze Tap ToCopy UnsafeView Unsqueeze View")

FactoredRule = Callable[[Any, int, list[Part], Any, Any], list[Part] | None]


def kept_alone(node: Any, own: tuple[int, ...]) -> int | None:
    """The dimension for whose every place a node makes one number, if rows or columns can be scaled by these."""
    dims = saved_option(node, "dim")
    if dims is None or not own:
        return None
    dims = dims if isinstance(dims, tuple) else (dims,)
    return _scalable(set(range(len(own))) - {dim % len(own) for dim in dims}, len(own))


def _scalable(kept: set[int], dims: int) -> int | None:
    """The one dimension that is kept, where it is that of rows, or of the columns of a matrix."""
    return next(iter(kept)) if kept == {0} or (kept == {1} and dims == 2) else None


def total(parts: Sequence[Part], shape: tuple[int, ...]) -> Tensor:
    """The gradients themselves, ``[n, *shape]``."""
    return sum_of([part.dense(slice(0, part.examples)) for part in parts]).reshape(-1, *shape)


def _reduced(parts: Sequence[Part], factor: Tensor, shape: tuple[int, ...], own: tuple[int, ...]) -> list[Part] | None:
    """The gradients of a tensor ``[*own]`` that is broadcast to ``[*shape]`` and multiplied by ``factor`` there."""
    if own == shape:
        return [part.times(factor, shape) for part in parts]
    aligned = (1,) * (len(shape) - len(own)) + own
    whole_dims = {dim for dim, size in enumerate(aligned) if size != 1}
    dim = _scalable(whole_dims or {0}, len(shape))
    if not shape or dim is None:
        return None
    whole = factor.expand(shape)
    along = sum_of([part.sums_along(dim, whole) for part in parts])
    if not whole_dims:
        along = along.sum(1)
    return [Product(PerExampleGradient(along.reshape(-1, *own)))]


def _same(node: Any, slot: int, parts: list[Part], shape: Any, own: tuple[int, ...]) -> list[Part] | None:
    """What only has its shape changed; rows stay rows."""
    if own == shape:
        return parts
    found: list[Part] = []
    for part in parts:
        if isinstance(part, Scaled):
            if not own or own[0] != shape[0] or part.dim != 0:
                return None
            found.append(Scaled(part.along, part.fixed.reshape(own)))
            continue
        factor = None if part.factor is None else part.factor.expand(shape).reshape(own)
        if isinstance(part.term, PerExampleGradient):
            found.append(Product(PerExampleGradient(part.term.gradient.reshape(-1, *own)), factor))
        else:
            found.append(Product(Reshaped(part.term, own), factor))
    return found


def _transposed(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    """The transpose of a matrix."""
    return transposes(parts, shape) if len(own) == 2 and own == shape[::-1] else None


def _transposed_dims(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    swapped = {saved_option(node, "dim0") % max(len(own), 1), saved_option(node, "dim1") % max(len(own), 1)}
    return _transposed(node, slot, parts, shape, own) if swapped == {0, 1} else None


def _permuted(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    order = [dim % len(own) for dim in saved_option(node, "dims")] if own else []
    return _transposed(node, slot, parts, shape, own) if order == [1, 0] else None


def _added(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    sign = -1 if operator_name(node) == "Sub" else 1
    factor = sign * saved_option(node, "alpha") if slot == 1 else 1
    return parts if factor == 1 and own == shape else _reduced(parts, _number(node, factor), shape, own)


def _saved(node: Any, name: str) -> Tensor | None:
    """A tensor or number that a node saved, beside its output, in a type in which sums of that are precise."""
    found = saved_by(node, name)
    return found.to(_number(node, 0)) if isinstance(found, Tensor) else None


def _operand(node: Any, name: str) -> Tensor | None:
    """The same, with one element along dimensions that it was expanded to, for what broadcasts."""
    found = _saved(node, name)
    if found is not None:
        for dim in range(found.dim()):
            found = found.narrow(dim, 0, 1) if found.shape[dim] > 1 and is_constant(found, dim) else found
    return found


def _number(node: Any, number: float) -> Tensor:
    """A number as a factor of gradients of a node's output."""
    output = node_outputs(node)[0]
    like = torch.empty((), dtype=output.dtype, device="meta")
    return torch.full((), number, dtype=accumulation_dtype(like), device=output.device)


def _multiplied(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    other = _operand(node, "self" if slot == 1 else "other")
    return _reduced(parts, other, shape, own) if other is not None else None


def _divided(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    other = _operand(node, "other")
    if other is None or saved_option(node, "rounding_mode") is not None:
        return None
    if slot == 0:
        return _reduced(parts, 1 / other, shape, own)
    divided = _operand(node, "self")
    return None if divided is None else _reduced(parts, -divided / other.square(), shape, own)


def _where(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    condition = saved_by(node, "condition")
    taken = condition if slot == 0 else ~condition
    return _reduced(parts, taken.to(_number(node, 1).dtype), shape, own)


def _expanded(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    return _reduced(parts, _number(node, 1), shape, own)


def _matrix_product(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    """``left [d, k] @ right [k, p]``."""
    other = _saved(node, "mat2" if slot == 0 else "self")
    return None if other is None else (of_left if slot == 0 else of_right)(parts, other, shape)


def _product_added(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    """``beta tensor + alpha left [d, k] @ right [k, p]``."""
    if slot == 0:
        return _reduced(parts, _number(node, saved_option(node, "beta")), shape, own)
    other, alpha = _saved(node, "mat2" if slot == 1 else "mat1"), saved_option(node, "alpha")
    return None if other is None else (of_left if slot == 1 else of_right)(parts, alpha * other, shape)


def _solved(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    """``X`` of ``A X = B``: of ``B`` it is a product with the inverse of ``A``, of ``A`` less that times ``X^T``."""
    matrix, solution = _saved(node, "A"), _saved(node, "result")
    if matrix is None or solution is None or matrix.dim() != 2 or len(shape) != 2 or not saved_option(node, "left"):
        return None
    of_rest = of_right(parts, torch.linalg.inv(matrix), shape)
    return of_rest if slot == 1 or of_rest is None else _negative(node, of_left(of_rest, solution, shape), own)


def _inverted(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    inverse = _saved(node, "inverse")
    if inverse is None or len(shape) != 2:
        return None
    once = of_right(parts, inverse, shape)
    return None if once is None else _negative(node, of_left(once, inverse, shape), own)


def _negative(node: Any, parts: list[Part] | None, shape: tuple[int, ...]) -> list[Part] | None:
    return None if parts is None else [part.times(_number(node, -1), shape) for part in parts]


def _exponential(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    matrix = _saved(node, "self")
    return of_exponential(parts, matrix) if matrix is not None and len(shape) == 2 else None


def _reflected(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    """A product of reflections."""
    vectors, tau = _saved(node, "input"), _saved(node, "tau")
    if vectors is None or tau is None or len(shape) != 2:
        return None
    found = of_reflections(parts, vectors, tau, shape, of_tau=slot == 1)
    return None if found is None else [Product(PerExampleGradient(found))]


def _cumulated(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    """Cumulative sums, as products with a triangular matrix of ones."""
    if len(shape) != 2:
        return None
    dim = saved_option(node, "dim") % 2
    ones = _number(node, 1).expand(shape[dim], shape[dim]).tril()
    return of_right(parts, ones, shape) if dim == 0 else of_left(parts, ones.t(), shape)


def _selected(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    """Rows or columns, some of them perhaps several times."""
    if operator_name(node) == "IndexSelect":
        dim, index = saved_option(node, "dim") % max(len(own), 1), saved_by(node, "index")
    else:
        given = [(dim, index) for dim, index in enumerate(saved_tensors_of(node, "indices")) if index is not None]
        dim, index = given[0] if len(given) == 1 else (0, None)
    if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
        return None
    places = index % max(own[dim], 1)

    def added(tensor: Tensor, along: int) -> Tensor:
        zeros = tensor.new_zeros([*tensor.shape[:along], own[dim], *tensor.shape[along + 1 :]])
        return zeros.index_add(along, places, tensor)

    return moved_along(parts, dim, shape, added, adds=True)


def _repeated(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    if len(own) != len(shape):
        return None
    found: list[Part] | None = parts
    before = list(shape)
    for dim, times in enumerate(saved_option(node, "repeats")):
        if times != 1 and found is not None:
            found = moved_along(found, dim, tuple(before), partial(_added_up, times), adds=True)
        before[dim] = own[dim]
    return found


def _added_up(times: int, tensor: Tensor, along: int) -> Tensor:
    return tensor.unflatten(along, (times, -1)).sum(along)


def _on_diagonal(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    """A square matrix with a vector on its diagonal, or that vector."""
    square = shape if operator_name(node) == "DiagEmbed" else own
    if len(square) != 2 or square[0] != square[1] or saved_option(node, "offset") != 0:
        return None
    one = torch.diag(_number(node, 1).expand(square[0]))
    if square is own:
        return [Scaled(total(parts, shape), one)]
    return [Product(PerExampleGradient(sum_of([part.sums_along(0, one) for part in parts])))]


def _flipped(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    found: list[Part] | None = parts
    for dim in saved_option(node, "dims"):
        if found is not None:
            found = moved_along(found, dim % len(shape), shape, lambda tensor, along: tensor.flip(along))
    return found


def _rolled(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    dims, shifts = saved_option(node, "dims"), saved_option(node, "shifts")
    if not dims:
        return None  # all elements, one behind the other
    found: list[Part] | None = parts
    for dim, shift in zip(dims, shifts, strict=True):
        if found is not None:
            found = moved_along(found, dim % len(shape), shape, partial(_rolled_back, shift))
    return found


def _rolled_back(shift: int, tensor: Tensor, along: int) -> Tensor:
    return tensor.roll(-shift, along)


def _sliced(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    dim = saved_option(node, "dim") % len(own)
    where = [saved_option(node, name) for name in ("start", "end", "step")]

    def padded(tensor: Tensor, along: int) -> Tensor:
        zeros = tensor.new_zeros([*tensor.shape[:along], own[dim], *tensor.shape[along + 1 :]])
        return zeros.slice_scatter(tensor, along, *where)

    return moved_along(parts, dim, shape, padded)


def _concatenated(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    if len(own) != len(shape):
        return None  # an empty tensor, which torch lets pass
    dim = saved_option(node, "dim") % len(shape)
    before, behind = node.next_functions[:slot], node.next_functions[slot + 1 :]
    if all(node is not None for node, _ in before):
        start = sum(entering_shape(*edge)[dim] for edge in before)
    elif all(node is not None for node, _ in behind):
        start = shape[dim] - own[dim] - sum(entering_shape(*edge)[dim] for edge in behind)
    else:
        return None  # constants on both sides, whose sizes nothing tells
    return moved_along(parts, dim, shape, lambda tensor, along: tensor.narrow(along, start, own[dim]))


def _matrix_times_vector(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    """``matrix [d, p] @ vector [p]``."""
    other = _saved(node, "vec" if slot == 0 else "self")
    if other is None:
        return None
    along = total(parts, shape)
    if slot == 0:
        return [Scaled(along, other.expand(own))]
    return [Product(PerExampleGradient(along @ other))]


def _weight_norm(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    """``g v / ||v||``, the norms of rows."""
    v, g, norm = (_saved(node, name) for name in ("v", "g", "result1"))
    if v is None or g is None or norm is None or saved_option(node, "dim") % v.dim() != 0:
        return None
    along = sum_of([part.sums_along(0, v / norm) for part in parts])
    if slot == 1:
        return [Product(PerExampleGradient(along.reshape(-1, *own)))]
    scaled: list[Part] = [part.times(g / norm, shape) for part in parts]
    return [*scaled, Scaled(-along * (g / norm).flatten(), v / norm)]


def _softmax(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    """``s (g - sum(s g))``; the logarithm's is ``g - s sum(g)``."""
    result, dim = _saved(node, "result"), kept_alone(node, own)
    if result is None or dim is None:
        return None
    logarithm = operator_name(node) == "LogSoftmax"
    s, of = (result.exp(), torch.ones_like(result)) if logarithm else (result, result)
    along = sum_of([part.sums_along(dim, of) for part in parts])
    scaled: list[Part] = list(parts) if logarithm else [part.times(s, shape) for part in parts]
    return [*scaled, Scaled(-along, s, dim)]


def _layer_norm(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    """``gain y + shift`` with rows ``y = (x - mean) rstd``."""
    rows = prod(saved_option(node, "normalized_shape")) == prod(shape[1:])
    x, mean, rstd = (_saved(node, name) for name in ("input", "result1", "result2"))
    if not rows or len(shape) < 2 or x is None or mean is None or rstd is None:
        return None
    y, gain = (x - mean) * rstd, _saved(node, "weight")
    if slot > 0:
        return _reduced(parts, y if slot == 1 else _number(node, 1), shape, own)
    if gain is not None:
        parts = [part.times(gain, shape) for part in parts]
    ones, along_rows = torch.ones_like(rstd).expand(shape), rstd.flatten() / prod(shape[1:])
    found: list[Part] = [part.times(rstd, shape) for part in parts]
    for fixed in (ones, y):
        along = sum_of([part.sums_along(0, fixed) for part in parts])
        found.append(Scaled(-along * along_rows, fixed))
    return found


RULES: dict[str, FactoredRule] = {
    **dict.fromkeys(SAME, _same),
    "T": _transposed,
    "Transpose": _transposed_dims,
    "Permute": _permuted,
    "DiagEmbed": _on_diagonal,
    "Diagonal": _on_diagonal,
    "Flip": _flipped,
    "Index": _selected,
    "IndexSelect": _selected,
    "Repeat": _repeated,
    "Roll": _rolled,
    "Slice": _sliced,
    "Cat": _concatenated,
    "Add": _added,
    "Sub": _added,
    "Mul": _multiplied,
    "Div": _divided,
    "Expand": _expanded,
    "Where": _where,
    "Addmm": _product_added,
    "Mm": _matrix_product,
    "Cumsum": _cumulated,
    "LinalgSolveEx": _solved,
    "LinalgInvEx": _inverted,
    "LinalgMatrixExp": _exponential,
    "LinalgHouseholderProduct": _reflected,
    "Mv": _matrix_times_vector,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "NativeLayerNorm": _layer_norm,
    "WeightNormInterface": _weight_norm,
}
