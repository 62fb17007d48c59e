"""The rules of operators: per-example gradients of what enters at one autograd node, from what the node saved.

A class token that is expanded, a position table that is added, a layer scale, the packed projection of
``nn.MultiheadAttention``, ``F.linear(x, layer.weight)``, the weight that ``weight_norm`` computes: each enters the
batch's computation at one node of the autograd graph, outside of layer calls. The gradient of the node's output, cut by
examples, and what the node saved for its own backward pass give the per-example gradients of what entered.

A rule is a function ``(entry, gy) -> term``, with ``gy`` the gradient of the node's first output; it returns None where
it does not hold. Then, and for operators without a rule, :mod:`engm.rules.any_operator` finds the gradients.
"""

from __future__ import annotations

from math import prod

from torch import Tensor

from ..terms import (
    ConvFactors,
    ConvGeometry,
    EmbeddingFactors,
    LinearFactors,
    PerExampleGradient,
    Term,
    accumulation_dtype,
)
from ..torch_internals import batch_norm_statistics, is_python_function, operator_name
from .conv import transposed_factors
from .entries import BATCH_NORMS, Entry, add_operator, aligned_shape
from .normalization import affine_terms, by_channel

# -- sums and products with broadcasting --------------------------------------------------------------------------


def _repeated(entry: Entry, contribution: Tensor) -> Term | None:
    """The term of a tensor that broadcasting repeated: ``contribution`` summed over everything it was repeated along.

    Args:
        entry: where the tensor enters.
        contribution: gradient of the repeated tensor, of the shape of the node's output.

    Returns:
        The term, or None if the tensor is not repeated along the batch: then each example has rows of its own in it.
    """
    aligned = aligned_shape(entry)
    if aligned[entry.layout.dim] != 1:
        return None
    kept = [size for dim, size in enumerate(aligned) if dim != entry.layout.dim]
    rows = entry.layout.examples_first(contribution, entry.n)
    shape, reduced = [entry.n, rows.shape[1]], [1]
    for size, length in zip(kept, rows.shape[2:], strict=True):
        if size == 0 or length % size:
            return None
        reduced.append(len(shape))
        shape += [length // size, size]
    rows = rows.reshape(shape)
    total = rows.sum(reduced, dtype=accumulation_dtype(rows))
    return PerExampleGradient(total.reshape(entry.n, *entry.shape))


@add_operator("Expand", "Repeat")
def _expand(entry: Entry, gy: Tensor) -> Term | None:
    return _repeated(entry, gy)


@add_operator("Add", "Sub")
def _add(entry: Entry, gy: Tensor) -> Term | None:
    sign = -1 if operator_name(entry.node) == "Sub" else 1
    factor = sign * entry.saved("alpha") if entry.slot == 1 else 1
    return _repeated(entry, gy if factor == 1 else gy * factor)


@add_operator("Mul")
def _mul(entry: Entry, gy: Tensor) -> Term | None:
    other = entry.saved("self" if entry.slot == 1 else "other")
    return _repeated(entry, gy * other) if isinstance(other, Tensor) else None


@add_operator("Div")
def _div(entry: Entry, gy: Tensor) -> Term | None:
    other = entry.saved("other")
    return _repeated(entry, gy / other) if entry.slot == 0 and isinstance(other, Tensor) else None


# -- matrix products -----------------------------------------------------------------------------------------------


def _product(entry: Entry, left: Tensor | None, gy: Tensor) -> Term | None:
    """The term of the right factor in ``left [R, p] @ entering [p, d]``, given ``gy [R, d]``."""
    if left is None or entry.layout.dim != 0:
        return None
    a, b = (entry.layout.examples_first(t, entry.n) for t in (left.to(gy.dtype), gy))
    return LinearFactors(a, b) if entry.transposed else LinearFactors(b, a)


@add_operator("Mm")
def _mm(entry: Entry, gy: Tensor) -> Term | None:
    return _product(entry, entry.saved("self"), gy) if entry.slot == 1 else None


@add_operator("Addmm")
def _addmm(entry: Entry, gy: Tensor) -> Term | None:
    if entry.slot == 0:
        beta = entry.saved("beta")
        return _repeated(entry, gy if beta == 1 else gy * beta)
    alpha = entry.saved("alpha")
    return _product(entry, entry.saved("mat1"), gy if alpha == 1 else gy * alpha) if entry.slot == 2 else None


@add_operator("Bmm")
def _bmm(entry: Entry, gy: Tensor) -> Term | None:
    left = entry.saved("self")
    if entry.slot != 1 or left is None or gy.shape[0] != 1 or entry.layout.dim != 1:
        return None
    a, b = (entry.layout.examples_first(t, entry.n).flatten(2) for t in (left.to(gy.dtype), gy))
    return PerExampleGradient(LinearFactors(b, a).dense(slice(0, entry.n)).unsqueeze(1))


# -- layers called as functions -------------------------------------------------------------------------------------


@add_operator("Convolution")
def _convolution(entry: Entry, gy: Tensor) -> Term | None:
    if entry.layout.dim != 0 or entry.slot not in (1, 2):
        return None
    layout, n = entry.layout, entry.n
    if entry.slot == 2:
        rows = gy.flatten(2).sum(2, dtype=accumulation_dtype(gy))
        return PerExampleGradient(layout.examples_first(rows, n).sum(1))
    inputs = entry.saved("input")
    if inputs is None:
        return None
    geometry = ConvGeometry(
        tuple(entry.shape[2:]),
        tuple(entry.saved("stride")),
        tuple(entry.saved("padding")),
        tuple(entry.saved("dilation")),
        int(entry.saved("groups")),
    )
    inputs = inputs.to(gy.dtype)
    factors = ConvFactors(inputs, gy, geometry)
    if entry.saved("transposed"):
        factors = transposed_factors(inputs, gy, geometry)
    return factors.fold(layout.outer, n, layout.inner)


@add_operator("Embedding")
def _embedding(entry: Entry, gy: Tensor) -> Term | None:
    indices = entry.saved("indices")
    if indices is None or entry.saved("scale_grad_by_freq"):
        return None
    a = entry.layout.examples_first(indices, entry.n).flatten(1)
    b = entry.layout.examples_first(gy, entry.n).reshape(*a.shape, gy.shape[-1])
    return EmbeddingFactors(a, b, entry.shape[0], int(entry.saved("padding_idx")), bool(entry.saved("sparse")))


def _affine(entry: Entry, views: tuple[Tensor, Tensor, Tensor | None, Tensor, int]) -> Term:
    """The term of the scale (slot 1) or shift (slot 2) of a normalisation.

    Args:
        entry: where the scale or shift enters.
        views: the arguments of :func:`engm.ops.affine_norm_sq`, with every row of the batch as an example.
    """
    name = "weight" if entry.slot == 1 else "bias"
    rows = affine_terms(views, (name,))[name].gradient  # type: ignore[attr-defined]
    gradient = entry.layout.examples_first(rows, entry.n).sum(1)
    return PerExampleGradient(gradient.reshape(entry.n, *entry.shape))


@add_operator("NativeLayerNorm")
def _layer_norm(entry: Entry, gy: Tensor) -> Term | None:
    x, mean, rstd = (entry.saved(name) for name in ("input", "result1", "result2"))
    if x is None or mean is None or rstd is None or entry.slot not in (1, 2):
        return None
    layout = entry.layout.flattened(tuple(gy.shape))
    rows, size = layout.outer * entry.n * layout.inner, prod(entry.shape)
    x, gy = (t.reshape(rows, -1, size) for t in (x, gy))
    flat = Entry(entry.node, entry.slot, entry.shape, layout, entry.n)
    return _affine(flat, (x, gy, mean.reshape(rows, -1, 1), rstd.reshape(rows, -1, 1), 2))


@add_operator("NativeGroupNorm")
def _group_norm(entry: Entry, gy: Tensor) -> Term | None:
    x, mean, rstd = (entry.saved(name) for name in ("input", "result1", "result2"))
    if x is None or mean is None or rstd is None or entry.slot not in (1, 2) or entry.layout.dim != 0:
        return None
    per_group = gy.shape[1] // int(entry.saved("group"))
    mean, rstd = (t.reshape(gy.shape[0], -1).repeat_interleave(per_group, 1) for t in (mean, rstd))
    return _affine(entry, by_channel(x, gy, mean, rstd))


@add_operator(*BATCH_NORMS)
def _batch_norm(entry: Entry, gy: Tensor) -> Term | None:
    python = is_python_function(entry.node)
    x = entry.node.saved_tensors[0].detach() if python else entry.saved("input")
    statistics = batch_norm_statistics(entry.node)
    if x is None or statistics is None or entry.slot not in (1, 2) or entry.layout.dim != 0:
        return None
    mean, rstd, _ = statistics
    return _affine(entry, by_channel(x, gy, mean.unsqueeze(0), rstd.unsqueeze(0)))
