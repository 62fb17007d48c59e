"""The rules of operators: per-example gradients of what enters at one autograd node, from what the node saved.

A class token that is expanded, a position table that is added, a layer scale, the packed projection of
``nn.MultiheadAttention``, ``F.linear(x, layer.weight)``, the weight that ``weight_norm`` computes: each enters the
batch's computation at one node of the autograd graph, outside of layer calls. The gradient of the node's output, cut by
examples, and what the node saved for its own backward pass give the per-example gradients of what entered.

A rule is a function ``(entry, gy) -> term``, with ``gy`` the gradient of the node's first output; it returns None where
it does not hold. Then, and for operators without a rule, :mod:`engm.rules.any_operator` finds the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from .. import ops
from ..terms import (
    CHUNK_BYTES,
    ConvFactors,
    ConvGeometry,
    EmbeddingFactors,
    LinearFactors,
    PerExampleGradient,
    Reshaped,
    Stacked,
    Term,
    accumulation_dtype,
)
from ..terms.layout import Layout
from ..terms.owners import Owners
from ..torch_internals import (
    BATCH_NORMS,
    batch_norm_statistics,
    is_python_function,
    operator_name,
    saved_tensors_of,
)
from .conv import transposed_factors
from .entries import Entry, Rows, add_operator, owners_of
from .normalization import affine_terms, by_channel

# -- sums and products with broadcasting --------------------------------------------------------------------------


def repeated_term(entry: Entry, contribution: Tensor, aligned: tuple[int, ...] | None = None) -> Term | None:
    """The term of a tensor that broadcasting repeated: ``contribution`` summed over everything it was repeated along.

    Args:
        entry: where the tensor enters.
        contribution: gradient of the repeated tensor, which has the dimensions of the node's output, or has others
            behind those in which the examples lie.
        aligned: the shape of the tensor in these dimensions; by default that of broadcasting.

    Returns:
        The term, or None if the contribution does not consist of repetitions of the tensor.
    """
    if aligned is None:
        aligned = (1,) * (contribution.dim() - len(entry.shape)) + entry.shape
    if contribution.is_complex() and not entry.is_complex:
        contribution = contribution.real
    if contribution.numel() == 0:
        return _nothing(entry, contribution)
    if any(size == 0 or length % size for size, length in zip(aligned, contribution.shape, strict=True)):
        return None
    where = entry.layout
    behind = next((dim for dim, size in enumerate(aligned) if size != 1), len(aligned))
    whole = aligned[behind:] == contribution.shape[behind:] and contribution.is_floating_point()
    if whole and isinstance(where, Layout) and where.dim < behind:
        # A bias: repeated along all dimensions in front of its own.
        rows = contribution if where.dim == 0 and where.outer == 1 else where.examples_first(contribution, entry.n)
        norm_sq, sums = ops.position_sums(rows.reshape(entry.n, -1, prod(aligned[behind:])), 1)
        return PerExampleGradient(sums.reshape(entry.n, *entry.shape), norm_sq)
    if isinstance(where, Layout) and aligned[where.dim] == 1:
        rows = where.examples_first(contribution, entry.n)
        gradient = _within(rows, 2, tuple(size for dim, size in enumerate(aligned) if dim != where.dim))
    else:
        gradient = _scattered(
            contribution, aligned, owners_of(where, tuple(contribution.shape), entry.n, contribution.device)
        )
    return PerExampleGradient(gradient.reshape(entry.n, *entry.shape))


def _nothing(entry: Entry, gy: Tensor) -> PerExampleGradient:
    """The term of a tensor that no element of the node's output depends on, because the output has none."""
    return PerExampleGradient(gy.new_zeros((entry.n, *entry.shape), dtype=accumulation_dtype(gy)))


def _within(rows: Tensor, leading: int, sizes: tuple[int, ...]) -> Tensor:
    """Sums over the second of ``leading`` dimensions and over repetitions along those that follow, to ``sizes``."""
    shape, summed = list(rows.shape[:leading]), [1]
    for size, length in zip(sizes, rows.shape[leading:], strict=True):
        summed.append(len(shape))
        shape += [length // size, size]
    return rows.reshape(shape).sum(summed, dtype=accumulation_dtype(rows))


def _scattered(contribution: Tensor, aligned: tuple[int, ...], owners: Owners) -> Tensor:
    """Contributions added to the gradients of their owners, ``[n, elements of the tensor]``.

    Args:
        contribution: gradient of the repeated tensor.
        aligned: shape of the tensor in the same dimensions.
        owners: of the contribution's elements.
    """
    dims, device = owners.dims, contribution.device
    count, size = owners.of.numel(), prod(aligned[dims:])
    rows = _within(contribution.reshape(count, 1, *contribution.shape[dims:]), 2, aligned[dims:]).reshape(count, size)
    place = torch.zeros((), dtype=torch.int64, device=device)  # of a row of the output in the rows of the tensor
    for dim in range(dims):
        along = torch.arange(contribution.shape[dim], device=device) % aligned[dim]
        place = place.unsqueeze(-1) * aligned[dim] + along
    held = prod(aligned[:dims])
    owner = torch.where(owners.of < 0, owners.n, owners.of)  # the gradients behind the last example's are nobody's
    total = torch.zeros(((owners.n + 1) * held, size), dtype=rows.dtype, device=device)
    return total.index_add_(0, (owner * held + place).flatten(), rows)[: owners.n * held]


@add_operator("Expand", "Repeat", of_complex=True)
def _expand(entry: Entry, gy: Tensor) -> Term | None:
    return repeated_term(entry, gy)


@add_operator("Add", "Sub", of_complex=True)
def _add(entry: Entry, gy: Tensor) -> Term | None:
    sign = -1 if operator_name(entry.node) == "Sub" else 1
    factor = sign * entry.saved("alpha").conjugate() if entry.slot == 1 else 1
    return repeated_term(entry, gy if factor == 1 else gy * factor)


@add_operator("Mul", of_complex=True)
def _mul(entry: Entry, gy: Tensor) -> Term | None:
    other = entry.saved("self" if entry.slot == 1 else "other")
    return repeated_term(entry, gy * other.conj()) if isinstance(other, Tensor) else None


@add_operator("Addcmul", of_complex=True)
def _addcmul(entry: Entry, gy: Tensor) -> Term | None:
    if entry.slot == 0:
        return repeated_term(entry, gy)
    other, factor = entry.saved("tensor2" if entry.slot == 1 else "tensor1"), entry.saved("value")
    return repeated_term(entry, gy * (other * factor).conj()) if isinstance(other, Tensor) else None


@add_operator("Where", of_complex=True)
def _where(entry: Entry, gy: Tensor) -> Term | None:
    condition = entry.saved("condition")
    taken = condition if entry.slot == 0 else ~condition
    return repeated_term(entry, torch.where(taken, gy, 0))


@add_operator("MaskedFill", of_complex=True)
def _masked_fill(entry: Entry, gy: Tensor) -> Term | None:
    """Slot 1 is the number that fills, a tensor without dimensions."""
    mask = entry.saved("mask")
    return repeated_term(entry, torch.where(mask if entry.slot == 1 else ~mask, gy, 0))


@add_operator("Div", of_complex=True)
def _div(entry: Entry, gy: Tensor) -> Term | None:
    other = entry.saved("other")
    if entry.slot != 0 or not isinstance(other, Tensor) or entry.saved("rounding_mode") is not None:
        return None
    return repeated_term(entry, gy / other.conj())


# -- matrix products -----------------------------------------------------------------------------------------------


def _outer(entry: Entry, rows: Rows | None, a: Tensor | None, b: Tensor) -> Term | None:
    """The term of a matrix ``[p, d]`` with the gradient ``sum_r a_r b_r^T`` over rows ``a [R, p]`` and ``b [R, d]``."""
    if a is None or rows is None:
        return None
    if b.is_complex():
        return None if entry.transposed else _by_products(entry, a, b)
    a, b = (t.unsqueeze(1) for t in (ops.in_type(a, b.dtype), b))
    return rows.add_up(LinearFactors(a, b) if entry.transposed else LinearFactors(b, a))


def _by_products(entry: Entry, a: Tensor, b: Tensor) -> Term | None:
    """The term of matrices ``[*, p, d]`` with the gradients ``sum_r conj(a_r) b_r^T``, from every product by itself.

    Args:
        entry: where the matrices enter.
        a: complex ``[*, R, p]``.
        b: complex ``[*, R, d]``.
    """
    if b.numel() * a.shape[-1] * b.element_size() > CHUNK_BYTES:
        return None
    products = a.to(b.dtype).conj().unsqueeze(-1) * b.unsqueeze(-2)
    *stack, p, d = entry.shape
    return repeated_term(entry, products, (*stack, 1, p, d))


def _right(entry: Entry, left: Tensor | None, gy: Tensor) -> Term | None:
    """The term of the right factor in ``left [R, p] @ entering [p, d]``, given ``gy [R, d]``."""
    return _outer(entry, entry.rows(most=1), left, gy)


def _left(entry: Entry, right: Tensor | None, gy: Tensor) -> Term | None:
    """The term of the left factor in ``entering [d, p] @ right [p, R]``, whose examples are columns of ``gy [d, R]``.

    Where they are rows instead, every example has rows of its own in the factor.
    """
    if right is None:
        return None
    where = entry.layout
    if isinstance(where, Layout) and where.dim == 1:
        columns = Rows(1, gy.shape[1], Layout(0, where.outer, where.inner))
        return None if gy.is_complex() else _outer(entry, columns, gy.t(), right.t().to(gy.dtype))
    if entry.transposed or entry.rows(most=1) is None:
        return None
    return repeated_term(entry, gy @ right.to(gy.dtype).mH, entry.shape)


@add_operator("Mm", of_complex=True)
def _mm(entry: Entry, gy: Tensor) -> Term | None:
    if entry.slot == 1:
        return _right(entry, entry.saved("self"), gy)
    return _left(entry, entry.saved("mat2"), gy)


@add_operator("Addmm")
def _addmm(entry: Entry, gy: Tensor) -> Term | None:
    def factor(gy: Tensor) -> Term | None:
        right = entry.slot == 2
        return _right(entry, entry.saved("mat1"), gy) if right else _left(entry, entry.saved("mat2"), gy)

    return _added(entry, gy, factor)


def _added(entry: Entry, gy: Tensor, factor: Callable[[Tensor], Term | None]) -> Term | None:
    """The term of what enters in ``beta * added + alpha * product``.

    Args:
        entry: of the sum, whose first input is what is added.
        gy: the gradient of the sum.
        factor: the term of a factor, given the gradient of the product.
    """
    times = entry.saved("alpha" if entry.slot else "beta")
    gy = gy if times == 1 else gy * times
    return factor(gy) if entry.slot else repeated_term(entry, gy)


@add_operator("Mv")
def _mv(entry: Entry, gy: Tensor) -> Term | None:
    """The term of the vector in ``matrix [R, p] @ entering [p]``, given ``gy [R]``."""
    matrix = entry.saved("self")
    return _vector(entry, matrix, gy) if entry.slot == 1 else None


@add_operator("Addmv")
def _addmv(entry: Entry, gy: Tensor) -> Term | None:
    return _added(entry, gy, lambda gy: _vector(entry, entry.saved("mat"), gy) if entry.slot == 2 else None)


def _vector(entry: Entry, matrix: Tensor | None, gy: Tensor) -> Term | None:
    """The term of a vector ``[p]`` with the gradient ``sum_r gy_r matrix_r``."""
    if matrix is None or entry.turns:
        return None
    return repeated_term(entry, gy.unsqueeze(1) * matrix.to(gy.dtype), (1, *entry.shape))


@add_operator("Bmm", of_complex=True)
def _bmm(entry: Entry, gy: Tensor) -> Term | None:
    return _left_of_many(entry, "mat2", gy) if entry.slot == 0 else _right_of_many(entry, "self", gy)


@add_operator("Baddbmm")
def _baddbmm(entry: Entry, gy: Tensor) -> Term | None:
    left = entry.slot == 1
    return _added(
        entry, gy, lambda gy: _left_of_many(entry, "batch2", gy) if left else _right_of_many(entry, "batch1", gy)
    )


def _left_of_many(entry: Entry, name: str, gy: Tensor) -> Term | None:
    """The term of the left factors in ``entering [m, R, p] @ right [m, p, d]``, given ``gy [m, R, d]``."""
    right = entry.saved(name)
    if right is None or entry.rows(most=2) is None:
        return None
    return repeated_term(entry, gy @ right.to(gy.dtype).mH, entry.shape)


def _right_of_many(entry: Entry, name: str, gy: Tensor) -> Term | None:
    """The term of the right factors in ``left [m, R, p] @ entering [m, p, d]``, given ``gy [m, R, d]``."""
    left, rows = entry.saved(name), entry.rows(most=2)
    if left is None or rows is None:
        return None
    if gy.numel() == 0:
        return _nothing(entry, gy)
    left = left.to(gy.dtype)
    if rows.dims == 1:  # each product is one example's
        return repeated_term(entry, left.mH @ gy, entry.shape)
    if gy.is_complex():
        return _by_products(entry, left, gy)
    where, parts = entry.layout, []
    for number, (a, b) in enumerate(zip(left, gy, strict=True)):
        own = Owners(where.of[number], where.n) if isinstance(where, Owners) else Layout(0, where.outer, where.inner)
        parts.append(LinearFactors(b.unsqueeze(1), a.unsqueeze(1)).grouped(own))
    return Stacked(parts)


@add_operator("GroupedMm")
def _grouped_mm(entry: Entry, gy: Tensor) -> Term | None:
    """The term of ``entering [m, p, d]``: the rows of ``left [R, p]`` up to each of ``offs [m]`` meet one matrix."""
    left, ends, rows = entry.saved("self"), entry.saved("offs"), entry.rows(most=1)
    if left is None or ends is None or rows is None or entry.slot != 1 or left.dim() != 2 or len(entry.shape) != 3:
        return None
    owners = owners_of(rows.ownership, tuple(gy.shape), entry.n, gy.device).of
    left, parts, start = left.to(gy.dtype), [], 0
    for end in ends.tolist():  # the rows behind the last end meet none
        of_one = slice(start, max(start, end))
        factors = LinearFactors(gy[of_one].unsqueeze(1), left[of_one].unsqueeze(1))
        parts.append(factors.grouped(Owners(owners[of_one], entry.n)))
        start = of_one.stop
    return Stacked(parts)


@add_operator("LinalgSolveEx")
def _solved(entry: Entry, gy: Tensor) -> Term | None:
    """The term of the matrix in ``entering [d, d] @ X [d, R] = B``, whose examples are columns of ``X``.

    Its gradient is that of ``B`` times ``-X^T``.
    """
    matrix, solution, where = entry.saved("A"), entry.saved("result"), entry.layout
    if entry.slot != 0 or matrix is None or solution is None or not entry.saved("left") or gy.is_complex():
        return None
    if matrix.dim() != 2 or gy.dim() != 2 or not isinstance(where, Layout) or where.dim != 1:
        return None
    columns = Rows(1, gy.shape[1], Layout(0, where.outer, where.inner))
    of_right = torch.linalg.solve(matrix.to(gy.dtype).mT, gy)
    return _outer(entry, columns, -of_right.t(), solution.t().to(gy.dtype))


@add_operator("Cdist", "EuclideanDist")
def _distances(entry: Entry, gy: Tensor) -> Term | None:
    """The term of the second points ``[m, d]`` in their distances ``[R, m]`` from the first ones, ``[R, d]``."""
    first, second, distances = (entry.saved(name) for name in ("x1", "x2", "result"))
    p = 2.0 if operator_name(entry.node) == "EuclideanDist" else entry.saved("p")
    if entry.slot != 1 or p not in (1, 2) or first is None or second is None or distances is None:
        return None
    if first.dim() != 2 or second.dim() != 2 or gy.numel() * second.shape[1] * gy.element_size() > CHUNK_BYTES:
        return None
    apart = second.to(gy.dtype) - first.to(gy.dtype).unsqueeze(1)
    if p == 1:
        return repeated_term(entry, apart.sign_().mul_(gy.unsqueeze(-1)), (1, *entry.shape))
    ratio = torch.where(distances == 0, 0, gy / distances)
    return repeated_term(entry, apart.mul_(ratio.unsqueeze(-1)), (1, *entry.shape))


# -- layers called as functions -------------------------------------------------------------------------------------


@add_operator("Convolution")
def _convolution(entry: Entry, gy: Tensor) -> Term | None:
    if entry.slot == 2:
        return repeated_term(entry, gy, (1, *entry.shape, *(1 for _ in gy.shape[2:])))
    inputs = entry.saved("input")
    return None if inputs is None or entry.slot != 1 else _of_convolution(entry, inputs, gy)


@add_operator("ConvolutionBackward")
def _convolution_backward(entry: Entry, gy: Tensor) -> Term | None:
    """The term of a weight by which gradients of a convolution's output became those of its input, the first output.

    That is linear in the weight, and made of the same products: those of ``gy``, with the size of the input, and the
    gradients of the output.
    """
    outputs = entry.saved("grad_output")
    return None if outputs is None or entry.slot != 2 else _of_convolution(entry, gy, outputs.to(gy.dtype))


def _of_convolution(entry: Entry, inputs: Tensor, gy: Tensor) -> Term | None:
    """The term of a convolution's weight, from tensors of the size of its inputs and of its outputs."""
    rows, dims = entry.rows(most=1), len(entry.shape) - 2
    if rows is None:
        return None
    stride, padding, dilation = (_each(entry.saved(name), dims) for name in ("stride", "padding", "dilation"))
    geometry = ConvGeometry(tuple(entry.shape[2:]), stride, padding, dilation, int(entry.saved("groups")))
    inputs = inputs.to(gy.dtype)
    transposed = entry.saved("transposed")
    factors = transposed_factors(inputs, gy, geometry) if transposed else ConvFactors(inputs, gy, geometry)
    return rows.add_up(factors)


def _each(values: Sequence[int], dims: int) -> tuple[int, ...]:
    """One value for every spatial dimension; a single one, as a convolution may save it, stands for all."""
    return tuple(values) * dims if len(values) == 1 else tuple(values)


@add_operator("Embedding")
def _embedding(entry: Entry, gy: Tensor) -> Term | None:
    indices, rows = entry.saved("indices"), entry.rows(most=gy.dim() - 1)
    if indices is None or rows is None or entry.saved("scale_grad_by_freq"):
        return None
    a = rows.of(indices).unsqueeze(1).flatten(1)
    b = gy.reshape(*a.shape, gy.shape[-1])
    padding_idx, sparse = int(entry.saved("padding_idx")), bool(entry.saved("sparse"))
    return rows.add_up(EmbeddingFactors(a, b, entry.shape[0], padding_idx, sparse))


@add_operator("Index", "IndexSelect")
def _index(entry: Entry, gy: Tensor) -> Term | None:
    """The term of a table of any number of dimensions, of which indices of the first of them pick elements."""
    picked = entry.saved("indices") or (entry.saved("index"),)
    rank = len(entry.shape)
    if any(index is None or index.dtype not in (torch.int32, torch.int64) for index in picked):
        return None
    if rank < len(picked) or (operator_name(entry.node) == "IndexSelect" and entry.saved("dim") % rank != 0):
        return None
    table, each = entry.shape[: len(picked)], entry.shape[len(picked) :]
    number = torch.zeros((), dtype=torch.int64, device=gy.device)
    for size, index in zip(table, picked, strict=True):
        number = number * size + index.to(gy.device) % size
    rows = entry.rows(most=number.dim())
    if rows is None or gy.numel() == 0 or tuple(gy.shape) != (*number.shape, *each):
        return None
    a = rows.of(number).unsqueeze(1).flatten(1)
    term = rows.add_up(EmbeddingFactors(a, gy.reshape(*a.shape, prod(each)), prod(table)))
    return term if len(table) == len(each) == 1 else Reshaped(term, entry.shape)


def _affine(entry: Entry, rows: Rows, views: tuple[Tensor, Tensor, Tensor | None, Tensor, int]) -> Term:
    """The term of the scale (slot 1) or shift (slot 2) of a normalisation.

    Args:
        entry: where the scale or shift enters.
        rows: of the batch.
        views: the arguments of :func:`engm.ops.affine_norm_sq`, with every row of the batch as an example.
    """
    name = "weight" if entry.slot == 1 else "bias"
    return rows.add_up(affine_terms(views, (name,), entry.shape)[name])


@add_operator("NativeLayerNorm")
def _layer_norm(entry: Entry, gy: Tensor) -> Term | None:
    x, mean, rstd = (entry.saved(name) for name in ("input", "result1", "result2"))
    size = prod(entry.shape)
    rows = entry.rows(most=gy.dim() - len(entry.shape))
    if x is None or mean is None or rstd is None or rows is None or entry.slot not in (1, 2):
        return None
    if gy.numel() == 0:
        return _nothing(entry, gy)
    x, gy = (t.reshape(rows.count, -1, size) for t in (x, gy))
    return _affine(entry, rows, (x, gy, mean.reshape(rows.count, -1, 1), rstd.reshape(rows.count, -1, 1), 2))


@add_operator("NativeGroupNorm")
def _group_norm(entry: Entry, gy: Tensor) -> Term | None:
    x, mean, rstd = (entry.saved(name) for name in ("input", "result1", "result2"))
    rows = entry.rows(most=1)
    if x is None or mean is None or rstd is None or rows is None or entry.slot not in (1, 2):
        return None
    if gy.numel() == 0:
        return _nothing(entry, gy)
    groups = int(entry.saved("group"))
    mean, rstd = (t.reshape(-1, groups).repeat_interleave(gy.shape[1] // groups, 1) for t in (mean, rstd))
    return _affine(entry, rows, by_channel(x, gy, mean, rstd))


@add_operator(*BATCH_NORMS)
def _batch_norm(entry: Entry, gy: Tensor) -> Term | None:
    python = is_python_function(entry.node)
    x = saved_tensors_of(entry.node, "")[0] if python else entry.saved("input")
    statistics, rows = batch_norm_statistics(entry.node), entry.rows(most=1)
    if x is None or statistics is None or rows is None or entry.slot not in (1, 2):
        return None
    if gy.numel() == 0:
        return _nothing(entry, gy)
    mean, rstd, _ = statistics
    return _affine(entry, rows, by_channel(x, gy, mean.unsqueeze(0), rstd.unsqueeze(0)))
