"""Per-example gradients of tensors that parameters alone are computed from, pulled back to the parameters in factors.

A spectral norm, a weight norm, a low-rank update that is added to a weight, a mask, a normalised classifier: a layer
reads a tensor ``W`` that is computed from parameters, and the gradients of its examples are products of factors,
``b_i a_i^T``. To pull all of them back one by one takes ``n`` times the memory of ``W``, and dozens of times the
layer's own time. But the few operators that such tensors are made of keep the gradients in a form that is as small as
the factors: a product with a matrix goes into one factor, a scale of the rows into the other, and what goes through a
norm, a mean or a trace becomes a fixed matrix whose rows are scaled by numbers of the example's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..ops import accumulation_dtype
from ..terms import ConvFactors, LinearFactors, PerExampleGradient, Reshaped, Term
from ..terms.combination import sum_of
from ..terms.parts import Part, Product, ScaledRows, is_constant
from ..torch_internals import (
    entering_dtype,
    entering_shape,
    is_opaque,
    is_recomputed,
    leaf_of,
    node_outputs,
    operator_name,
    output_shape,
    saved_by,
    saved_option,
)
from .entries import names_of

# Operators that hand on a gradient as it is, in a shape that may have other dimensions of one element.
SAME = names_of("Alias Clone ReshapeAlias Squeeze Tap ToCopy UnsafeView Unsqueeze View")

# Operators that treat every element apart, if they read no other trained tensor.
BY_ELEMENT = names_of(
    """
    Abs Clamp ClampMax ClampMin Elu Exp Expm1 Gelu Hardtanh LeakyRelu Log Log1P MaskedFill Maximum Minimum Neg Pow
    Reciprocal Relu Rsqrt Rsub Sigmoid Silu Softplus Sqrt Square Tanh
    """
)

# Operators that make one number of what lies along some dimensions.
REDUCING = names_of("Amax Amin LinalgVectorNorm Logsumexp Mean Norm Std Sum Var")

Edge = tuple[Any, int]
"""A tensor: the node that made it, and which of the node's outputs it is."""

Arrived = dict[Edge, list[Part] | None]
"""The gradients that have come to tensors so far; None where something came that is not known."""


class FactoredPull:
    """Pulls the gradients of tensors back to all parameters that they were computed from, once.

    Args:
        uses: the tensors, and their terms.
    """

    def __init__(self, uses: Sequence[tuple[Edge, Term]]) -> None:
        self._uses = uses

    @cached_property
    def terms(self) -> list[Term]:
        """The smallest terms of the tensors."""
        return [term.compact() for _, term in self._uses]

    def parts_of(self, parameter: Tensor) -> list[Part] | None:
        """What the gradients of a parameter are the sum of; None if some operator in between is not known here."""
        return self._parts.get(id(parameter))

    @cached_property
    def _parts(self) -> dict[int, list[Part] | None]:
        arrived: Arrived = {}
        for (edge, _), term in zip(self._uses, self.terms, strict=True):
            _add(arrived, edge, _entering(edge, term))
        found: dict[int, list[Part] | None] = {}
        for node in in_order([node for (node, _), _ in self._uses]):
            parts = arrived.pop((node, 0), None)
            leaf = leaf_of(node)
            if leaf is not None:
                found[id(leaf)] = parts
                continue
            others = any(arrived.pop((node, number), ()) for number in range(1, len(node_outputs(node))))
            known = parts is not None and not (others or is_opaque(node) or is_recomputed(node))
            passed = _through(node, parts) if known and parts is not None else {}
            for edge in {edge for edge in node.next_functions if edge[0] is not None}:
                _add(arrived, edge, passed.get(edge))
        return found


def _add(arrived: Arrived, edge: Edge, parts: list[Part] | None) -> None:
    """Add gradients to those of a tensor, of which nothing is known any more if they are not known."""
    there = arrived.get(edge, [])
    arrived[edge] = None if there is None or parts is None else there + parts


def _entering(edge: Edge, term: Term) -> list[Part] | None:
    """The gradients of the tensor that a layer reads."""
    if isinstance(term, LinearFactors | ConvFactors):
        if term.correction is not None:
            return None
        dtype = accumulation_dtype(term.backprops)  # a factor of 16 bits has no room to be scaled
        term = replace(term, **{name: getattr(term, name).to(dtype) for name in term.by_example})
    return None if entering_dtype(*edge).is_complex else [Product(term)]


def in_order(ends: Sequence[Any]) -> list[Any]:
    """Nodes and all behind them, each before those that it hands gradients to."""
    found: list[Any] = []
    visited: set[Any] = set()
    pending = [(node, False) for node in ends]
    while pending:
        node, done = pending.pop()
        if done:
            found.append(node)
        elif node not in visited:
            visited.add(node)
            pending.append((node, True))
            pending += [(child, False) for child, _ in node.next_functions if child is not None]
    return found[::-1]


def _through(node: Any, parts: list[Part]) -> Arrived:
    """The gradients of a node's inputs, from those of its output; a missing one is not known."""
    name, shape = operator_name(node), output_shape(node)
    edges = [(slot, edge) for slot, edge in enumerate(node.next_functions) if edge[0] is not None]
    if any(entering_dtype(*edge).is_complex for _, edge in edges):
        return {}
    found: Arrived = {}
    rule = _RULES.get(name)
    if rule is not None:
        for slot, edge in edges:
            _add(found, edge, rule(node, slot, parts, shape, entering_shape(*edge)))
        return found
    if len({edge for _, edge in edges}) != 1:
        return found  # what comes to one of them may come by way of another
    edge = edges[0][1]
    own = entering_shape(*edge)
    if prod(shape) == 1 and own:
        of_each = _total(parts, shape).reshape(-1, 1).expand(-1, own[0])
        found[edge] = [ScaledRows(of_each, _derivative(node, edge, shape, own))]
    elif name in BY_ELEMENT and own == shape:
        derivative = _derivative(node, edge, shape, own)
        found[edge] = [part.times(derivative, shape) for part in parts]
    elif name in REDUCING and _keeps_rows_alone(node, own):
        of_rows = _total(parts, shape).reshape(-1, own[0])
        found[edge] = [ScaledRows(of_rows, _derivative(node, edge, shape, own))]
    return found


def _derivative(node: Any, edge: Edge, shape: tuple[int, ...], own: tuple[int, ...]) -> Tensor:
    """What a node makes of a gradient of ones, ``[*own]``."""
    output = node_outputs(node)[0]
    dtype, device = output.dtype, output.device
    ones = torch.ones(shape, dtype=dtype, device=device)
    (found,) = torch.autograd.grad(
        [GradientEdge(node, 0)], [GradientEdge(*edge)], [ones], retain_graph=True, allow_unused=True
    )
    return torch.zeros(own, dtype=dtype, device=device) if found is None else found.detach()


def _keeps_rows_alone(node: Any, own: tuple[int, ...]) -> bool:
    """Whether a node makes one number of every row ``[d, *rest]``."""
    dims = saved_option(node, "dim")
    if dims is None or not own:
        return False
    dims = dims if isinstance(dims, tuple) else (dims,)
    return {dim % len(own) for dim in dims} == set(range(1, len(own)))


def _total(parts: Sequence[Part], shape: tuple[int, ...]) -> Tensor:
    """The gradients themselves, ``[n, *shape]``."""
    return sum_of([part.dense(slice(0, part.examples)) for part in parts]).reshape(-1, *shape)


def _reduced(parts: Sequence[Part], factor: Tensor, shape: tuple[int, ...], own: tuple[int, ...]) -> list[Part] | None:
    """The gradients of a tensor ``[*own]`` that is broadcast to ``[*shape]`` and multiplied by ``factor`` there."""
    if own == shape:
        return [part.times(factor, shape) for part in parts]
    aligned = (1,) * (len(shape) - len(own)) + own
    if not shape or any(size != 1 for size in aligned[1:]) or aligned[0] not in (1, shape[0]):
        return None
    whole = factor.expand(shape)
    of_rows = sum_of([part.by_row(whole) for part in parts])
    if aligned[0] != shape[0]:
        of_rows = of_rows.sum(1)
    return [Product(PerExampleGradient(of_rows.reshape(-1, *own)))]


# -- operators that are known by name: (node, slot, parts, shape of the output, shape of the input) ----------------


def _same(node: Any, slot: int, parts: list[Part], shape: Any, own: tuple[int, ...]) -> list[Part] | None:
    """What only has its shape changed; rows stay rows."""
    if own == shape:
        return parts
    found: list[Part] = []
    for part in parts:
        if isinstance(part, ScaledRows):
            if not own or own[0] != shape[0]:
                return None
            found.append(ScaledRows(part.along, part.fixed.reshape(own)))
            continue
        factor = None if part.factor is None else part.factor.expand(shape).reshape(own)
        if isinstance(part.term, PerExampleGradient):
            found.append(Product(PerExampleGradient(part.term.gradient.reshape(-1, *own)), factor))
        else:
            found.append(Product(Reshaped(part.term, own), factor))
    return found


def _transposed(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    """The transpose of a matrix."""
    if len(own) != 2 or own != shape[::-1]:
        return None
    found: list[Part] = []
    for part in parts:
        if isinstance(part, ScaledRows) and is_constant(part.fixed, 0):
            part = part.as_product()
        if isinstance(part, ScaledRows):
            if not is_constant(part.along, 1):
                return None  # columns would be scaled
            found.append(ScaledRows(part.along[:, :1].expand(-1, own[0]), part.fixed.t()))
            continue
        factor = None if part.factor is None else part.factor.expand(shape).t()
        if isinstance(part.term, LinearFactors):
            found.append(Product(LinearFactors(part.term.backprops, part.term.activations), factor))
        elif isinstance(part.term, PerExampleGradient):
            found.append(Product(PerExampleGradient(part.term.gradient.mT), factor))
        else:
            return None
    return found


def _transposed_dims(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    swapped = {saved_option(node, "dim0") % max(len(own), 1), saved_option(node, "dim1") % max(len(own), 1)}
    return _transposed(node, slot, parts, shape, own) if swapped == {0, 1} else None


def _added(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    sign = -1 if operator_name(node) == "Sub" else 1
    factor = sign * saved_option(node, "alpha") if slot == 1 else 1
    return parts if factor == 1 and own == shape else _reduced(parts, _number(node, factor), shape, own)


def _saved(node: Any, name: str) -> Tensor | None:
    """A tensor that a node saved, a number as well, in a type in which sums of its output are precise."""
    found = saved_by(node, name)
    return found.to(_number(node, 0).dtype) if isinstance(found, Tensor) else None


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
    if other is None:
        return None
    found: list[Part] = []
    for part in parts:
        if isinstance(part, ScaledRows):
            if slot == 0:
                found.append(ScaledRows(part.along, part.fixed @ other.t()))
                continue
            if own[0] > part.examples:
                return None  # the products below would be larger than the gradients
            each = (other.unsqueeze(2) * part.fixed.unsqueeze(1)).flatten(1)
            found.append(Product(PerExampleGradient((part.along @ each).view(-1, *own))))
        elif part.factor is None and isinstance(part.term, LinearFactors):
            a, b, other = part.term.activations, part.term.backprops, other.to(part.term.backprops.dtype)
            found.append(Product(LinearFactors(a @ other.t(), b) if slot == 0 else LinearFactors(a, b @ other)))
        elif isinstance(part.term, PerExampleGradient):
            gradient = part.dense(slice(0, part.examples))
            found.append(Product(PerExampleGradient(gradient @ other.t() if slot == 0 else other.t() @ gradient)))
        else:
            return None
    return found


def _matrix_times_vector(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    """``matrix [d, p] @ vector [p]``."""
    other = _saved(node, "vec" if slot == 0 else "self")
    if other is None:
        return None
    of_rows = _total(parts, shape)
    if slot == 0:
        return [ScaledRows(of_rows, other.expand(own))]
    return [Product(PerExampleGradient(of_rows @ other))]


def _weight_norm(node: Any, slot: int, parts: list[Part], shape: Any, own: Any) -> list[Part] | None:
    """``g v / ||v||``, the norms of rows."""
    v, g, norm = (_saved(node, name) for name in ("v", "g", "result1"))
    if v is None or g is None or norm is None or saved_option(node, "dim") % v.dim() != 0:
        return None
    of_rows = sum_of([part.by_row(v / norm) for part in parts])
    if slot == 1:
        return [Product(PerExampleGradient(of_rows.reshape(-1, *own)))]
    scaled: list[Part] = [part.times(g / norm, shape) for part in parts]
    return [*scaled, ScaledRows(-of_rows * (g / norm).flatten(), v / norm)]


_RULES = {
    **dict.fromkeys(SAME, _same),
    "T": _transposed,
    "Transpose": _transposed_dims,
    "Add": _added,
    "Sub": _added,
    "Mul": _multiplied,
    "Div": _divided,
    "Expand": _expanded,
    "Where": _where,
    "Mm": _matrix_product,
    "Mv": _matrix_times_vector,
    "WeightNormInterface": _weight_norm,
}
