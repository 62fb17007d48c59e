"""Per-example gradients of tensors that parameters alone are computed from, pulled back to the parameters in factors.

A spectral norm, a weight norm, a low-rank update that is added to a weight, a mask, a normalised classifier: a layer
reads a tensor ``W`` that is computed from parameters, and the gradients of its examples are products of factors,
``b_i a_i^T``. To pull all of them back one by one takes ``n`` times the memory of ``W``, and dozens of times the
layer's own time. But the few operators that such tensors are made of keep the gradients in a form that is as small as
the factors: a product with a matrix goes into one factor, a scale of the rows into the other, and what goes through a
norm, a mean or a trace becomes a fixed matrix whose rows or columns are scaled by numbers of the example's.
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
from ..terms import ConvFactors, LinearFactors, Term
from ..terms.parts import Part, Product, Scaled, joined
from ..torch_internals import (
    computed_anew,
    decided_for_now,
    entering_dtype,
    entering_shape,
    is_opaque,
    leaf_of,
    node_outputs,
    operator_name,
    output_shape,
)
from .entries import names_of
from .factored_operators import RULES, kept_alone, total

# Operators that treat every element apart, if they read no other trained tensor.
BY_ELEMENT = names_of(
    """
    Abs Atan Clamp ClampMax ClampMin Cos Elu Erf Exp Expm1 FakeQuantizePerChannelAffineCachemask
    FakeQuantizePerTensorAffineCachemask FakeQuantizePerTensorAffineCachemaskTensorQparams FusedMovingAvgObsFqHelper
    Gelu Hardsigmoid Hardswish Hardtanh LeakyRelu Log Log1P LogSigmoid MaskedFill Maximum Minimum Mish Neg Pow
    Reciprocal Relu Rsqrt Rsub Sigmoid Silu Sin Softplus Sqrt Square Tan Tanh Threshold Tril Triu
    """
)

# Operators whose derivatives may be infinite. Others behind them that pass on some elements alone, nothing of the rest,
# would become a factor of 0, by which no infinite one may be multiplied.
SINGULAR = names_of("Div Log Log1P Pow Reciprocal Rsqrt Sqrt")

# Operators that make one number of what lies along some dimensions.
REDUCING = names_of("Amax Amin LinalgVectorNorm Logsumexp Mean Norm Std Sum Var")

EXPONENTS = {torch.float32: 90, torch.float64: 400}  # of the largest elements of a probe; numbers have some more

USUAL = 20  # the same for numbers of usual sizes

ROUNDINGS = 100  # more than a few products differ from the same ones in another order

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

    def knows(self, parameter: Tensor) -> bool:
        """Whether there are such parts, let go of or not."""
        return id(parameter) in self._known

    def let_go(self, parameter: Tensor) -> None:
        """Forget the parts of a parameter, which may be as large as the gradients of all examples."""
        if self.knows(parameter):
            self._parts[id(parameter)] = None

    @cached_property
    def _known(self) -> frozenset[int]:
        return frozenset(key for key, parts in self._parts.items() if parts is not None)

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
            passed: Arrived = {}
            if parts is not None and not others:
                passed = _through_function(node, parts) if is_opaque(node) else _through(node, parts)
            for edge in {edge for edge in node.next_functions if edge[0] is not None}:
                _add(arrived, edge, passed.get(edge))
        return found


def _add(arrived: Arrived, edge: Edge, parts: list[Part] | None) -> None:
    """Add gradients to those of a tensor, of which nothing is known any more if they are not known."""
    there = arrived.get(edge, [])
    arrived[edge] = None if there is None or parts is None else joined(there + parts)


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
    rule = RULES.get(name)
    if rule is not None:
        for slot, edge in edges:
            passed = rule(node, slot, parts, shape, entering_shape(*edge))
            _add(found, edge, passed if passed is None or name not in SINGULAR or _are_finite(passed) else None)
        return found
    if len({edge for _, edge in edges}) != 1:
        return found  # what comes to one of them may come by way of another
    edge = edges[0][1]
    own = entering_shape(*edge)
    if prod(shape) == 1 and own:
        of_each = total(parts, shape).reshape(-1, 1).expand(-1, own[0])
        found[edge] = [Scaled(of_each, _derivative(node, edge, shape, own))]
    elif name in BY_ELEMENT and own == shape:
        derivative = _derivative(node, edge, shape, own)
        if name not in SINGULAR or decided_for_now(derivative.isfinite().all()):
            found[edge] = [part.times(derivative, shape) for part in parts]
    elif name in REDUCING and (dim := kept_alone(node, own)) is not None:
        along = total(parts, shape).reshape(-1, own[dim])
        found[edge] = [Scaled(along, _derivative(node, edge, shape, own), dim)]
    return found


def _are_finite(parts: Sequence[Part]) -> bool:
    """Whether all that gradients are multiplied by is."""
    fixed = [part.fixed if isinstance(part, Scaled) else part.factor for part in parts]
    return all(decided_for_now(factor.isfinite().all()) for factor in fixed if factor is not None)


def _through_function(node: Any, parts: list[Part]) -> Arrived:
    """The same of an operator from outside of torch, if it treats every element apart, as what rounds weights does.

    That is seen from what its backward pass makes of gradients with elements of all sizes, each a large one in one of
    them and a small one in another: where it mixes elements, or changes them by how large they are, some of them are
    not multiplied by what it makes of ones.
    """
    found: Arrived = {}
    shape = output_shape(node)
    for edge in {edge for edge in node.next_functions if edge[0] is not None}:
        own, dtype = entering_shape(*edge), entering_dtype(*edge)
        if own != shape or dtype not in EXPONENTS:
            continue  # in 16 bits rounding hides too much
        derivative = _derivative(node, edge, shape, own)
        places = torch.arange(1, derivative.numel() + 1, dtype=dtype, device=derivative.device).view(shape)
        most, eps = EXPONENTS[dtype], torch.finfo(dtype).eps
        near = []
        for exponent in (most, -most, USUAL):
            probe = torch.exp2(exponent * places.cos()) * places.sin().sign()
            wanted = probe * derivative
            near.append((_pulled(node, edge, probe, own) - wanted).abs() <= ROUNDINGS * eps * wanted.abs())
        if decided_for_now(torch.stack(near).all()):  # NaN is near nothing
            found[edge] = [part.times(derivative, shape) for part in parts]
    return found


def _derivative(node: Any, edge: Edge, shape: tuple[int, ...], own: tuple[int, ...]) -> Tensor:
    """What a node makes of a gradient of ones, ``[*own]``."""
    output = node_outputs(node)[0]
    return _pulled(node, edge, torch.ones(shape, dtype=output.dtype, device=output.device), own)


def _pulled(node: Any, edge: Edge, gradient: Tensor, own: tuple[int, ...]) -> Tensor:
    """What a node makes of a gradient of its output, ``[*own]``."""
    alone = len({child for child, _ in node.next_functions if child is not None}) == 1
    with computed_anew([node] if alone else in_order([node])):  # a leaf may lie behind other inputs too
        (found,) = torch.autograd.grad(
            [GradientEdge(node, 0)], [GradientEdge(*edge)], [gradient], retain_graph=True, allow_unused=True
        )
    return gradient.new_zeros(own) if found is None else found.detach()
