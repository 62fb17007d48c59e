"""Per-example gradients of a tensor as a sum of parts, each as small as the factors of a layer's gradients.

They are what gradients become on their way from a weight that a layer reads to the parameters that the weight was
computed from (:mod:`engm.rules.in_factors`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LocalCorrection, PerExampleGradient, Term, squared_rows
from .combination import combine, sum_of
from .convolution import ConvFactors
from .linear import LinearFactors

DENSE_ELEMENTS = 1 << 19  # of gradients that are formed at once where they have to be formed: they stay in the cache


@dataclass
class Product:
    """Per-example gradients ``[n, *shape]`` that are those of a term, element by element times ``factor``.

    Attributes:
        term: of gradients of the same shape.
        factor: is broadcast to ``[*shape]``; None for one.
    """

    term: Term
    factor: Tensor | None = None

    @property
    def examples(self) -> int:
        return self.term.examples

    def times(self, factor: Tensor, shape: tuple[int, ...]) -> Product:
        """The gradients times what is broadcast to their shape."""
        term = self.term
        if self.factor is None and shape:
            along = varying(factor, shape)
            if along <= {0} and isinstance(term, LinearFactors | ConvFactors):
                by_row = _first_of(factor, shape, 0)
                channel = 2 if isinstance(term, LinearFactors) else 1
                scale = by_row.view([-1 if k == channel else 1 for k in range(term.backprops.dim())])
                return Product(replace(term, backprops=term.backprops * scale.to(term.backprops.dtype)))
            if along <= {1} and isinstance(term, LinearFactors):
                by_column = _first_of(factor, shape, 1).to(term.activations.dtype)
                return Product(replace(term, activations=term.activations * by_column))
        return Product(term, factor if self.factor is None else self.factor * factor)

    def sums_along(self, dim: int, fixed: Tensor) -> Tensor:
        """The gradients times ``fixed [*shape]``, summed over all dimensions but one, ``[n, shape[dim]]``.

        Args:
            dim: 0, or 1 of matrices.
            fixed: what they are multiplied by.
        """
        term, fixed = self.term, fixed if self.factor is None else fixed * self.factor
        if isinstance(term, LinearFactors):
            a, b, fixed = term.activations, term.backprops, fixed.to(term.activations.dtype)
            return (b * (a @ fixed.t())).sum(1) if dim == 0 else (a * (b @ fixed)).sum(1)
        if isinstance(term, ConvFactors):
            return (term.backprops * _convolved(term, fixed)).flatten(2).sum(2)
        chunks = [term.dense(rows) * fixed for rows in _chunks(term.examples, fixed.numel())]
        return torch.cat([_sums_but(chunk, dim + 1, kept=0) for chunk in chunks])

    def transposed(self, shape: tuple[int, ...]) -> Product | None:
        """The transposed matrices, of matrices of this shape; None where the term cannot be transposed."""
        term, factor = self.term, None if self.factor is None else self.factor.expand(shape).t()
        if isinstance(term, LinearFactors):
            return Product(LinearFactors(term.backprops, term.activations), factor)
        if isinstance(term, PerExampleGradient):
            return Product(PerExampleGradient(term.gradient.mT), factor)
        return None

    def dense(self, rows: slice) -> Tensor:
        """The gradients of some examples."""
        found = self.term.dense(rows)
        return found if self.factor is None else found * self.factor


@dataclass
class Scaled:
    """Per-example gradients ``[n, *shape]`` that are one fixed tensor, whose slices are scaled by an example's numbers.

    Attributes:
        along: the numbers, ``[n, shape[dim]]``.
        fixed: ``[*shape]``.
        dim: 0 where rows are scaled, 1 where columns of a matrix are.
    """

    along: Tensor
    fixed: Tensor
    dim: int = 0

    @property
    def examples(self) -> int:
        return self.along.shape[0]

    def times(self, factor: Tensor, shape: tuple[int, ...]) -> Scaled:
        """The gradients times what is broadcast to their shape."""
        return replace(self, fixed=self.fixed * factor)

    def sums_along(self, dim: int, fixed: Tensor) -> Tensor:
        """As :meth:`Product.sums_along`."""
        product = self.fixed * fixed
        if dim == self.dim:
            return self.along * _sums_but(product, dim)
        return self.along @ (product if dim == 1 else product.t())

    def transposed(self, shape: tuple[int, ...]) -> Scaled:
        """As :meth:`Product.transposed`."""
        return Scaled(self.along, self.fixed.t(), 1 - self.dim)

    def dense(self, rows: slice) -> Tensor:
        """The gradients of some examples."""
        numbers = self.along[rows]
        before, behind = [1] * self.dim, [1] * (self.fixed.dim() - 1 - self.dim)
        return numbers.view(len(numbers), *before, numbers.shape[1], *behind) * self.fixed

    def as_product(self) -> Product:
        """Of a matrix whose slices are all the same: outer products."""
        dtype = torch.promote_types(self.along.dtype, self.fixed.dtype)  # sums are wider than what is fixed
        along = self.along.unsqueeze(1).to(dtype)
        others = self.fixed.select(self.dim, 0).to(dtype).expand(self.examples, -1).unsqueeze(1)
        return Product(LinearFactors(others, along) if self.dim == 0 else LinearFactors(along, others))


Part = Product | Scaled


def _sums_but(tensor: Tensor, dim: int, kept: int | None = None) -> Tensor:
    """Sums over all dimensions but one, or two."""
    over = [k for k in range(tensor.dim()) if k not in (dim, kept)]
    return tensor.sum(over) if over else tensor


def is_constant(tensor: Tensor, dim: int) -> bool:
    """Whether the elements along a dimension are known to be equal."""
    return tensor.shape[dim] == 1 or tensor.stride(dim) == 0


def varying(factor: Tensor, shape: tuple[int, ...]) -> set[int]:
    """The dimensions of ``shape`` along which something that is broadcast to it is not known to be constant."""
    first = len(shape) - factor.dim()
    return {first + k for k in range(factor.dim()) if not is_constant(factor, k)}


def _first_of(factor: Tensor, shape: tuple[int, ...], kept: int) -> Tensor:
    """A factor that varies along one dimension alone, as a vector of that dimension's length or of one number."""
    factor = factor.reshape((1,) * (len(shape) - factor.dim()) + tuple(factor.shape))
    for dim in range(factor.dim()):
        if dim != kept:
            factor = factor.narrow(dim, 0, 1)
    return factor.flatten()


def _convolved(term: ConvFactors, weight: Tensor) -> Tensor:
    """What a convolution with this weight makes of the term's inputs."""
    geometry, kind = term.geometry, (F.conv1d, F.conv2d, F.conv3d)[len(term.geometry.kernel_size) - 1]
    weight = weight.reshape(*weight.shape[:2], *geometry.kernel_size).to(term.inputs.dtype)
    return kind(term.inputs, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


def _chunks(n: int, elements: int) -> Iterator[slice]:
    step = max(1, DENSE_ELEMENTS // max(1, elements))
    for start in range(0, max(1, n), step):
        yield slice(start, min(start + step, n))


def joined(parts: Sequence[Part]) -> list[Part]:
    """The same sum, in which no term has two factors: ``w * w`` hands on its gradient once a side."""
    factors: dict[int, list[Tensor]] = {}
    for part in parts:
        if isinstance(part, Product) and part.factor is not None:
            factors.setdefault(id(part.term), []).append(part.factor)
    found: list[Part] = []
    for part in parts:
        if not isinstance(part, Product) or part.factor is None:
            found.append(part)
        elif own := factors.pop(id(part.term), None):
            found.append(Product(part.term, sum_of(own)))
    return found


def squared_norm_of(parts: Sequence[Part], shape: tuple[int, ...]) -> Tensor:
    """``||g_i||^2``, ``[n]``, of the sum of some gradients ``[n, *shape]``."""
    if 0 in shape:
        return squared_rows(parts[0].dense(slice(0, parts[0].examples)))
    products: list[Product] = []
    fixed: list[Scaled] = []
    for part in joined(parts):
        if isinstance(part, Scaled) and len(shape) == 2 and is_constant(part.fixed, part.dim):
            part = part.as_product()
        if isinstance(part, Product):
            products.append(part)
        else:
            fixed.append(part)
    if products and all(part.factor is None for part in products):
        whole = combine([part.term for part in products])
        if not fixed:
            return whole.squared_norm()
        if len(fixed) == 1 and isinstance(whole, LinearFactors | ConvFactors):
            scaled = fixed[0]
            if scaled.dim == 1 and isinstance(whole, LinearFactors):
                whole, scaled = LinearFactors(whole.backprops, whole.activations), scaled.transposed(shape)
            return replace(whole, correction=_correction(whole, scaled)).squared_norm()
    outer = outer_of([*products, *fixed], shape)
    # Of a sum of squares that cancel half of the digits are left: enough where there are twice as many. To form the
    # gradients of a few examples takes less time.
    if outer and (len(outer) == 1 or (outer[0].dtype != torch.float64 and parts[0].examples >= len(outer) ** 2)):
        return squared_norm_of_outer(outer)
    return torch.cat([squared_rows(dense_of(parts, rows)) for rows in _chunks(parts[0].examples, prod(shape))])


class Outer(NamedTuple):
    """Per-example gradients ``left_i right_i^T``, element by element times ``fixed``.

    Attributes:
        left: ``[n, d]``; None for ones.
        right: ``[n, p]``; None for ones.
        fixed: ``[d, p]``; None for ones, where neither of the others is None.
    """

    left: Tensor | None
    right: Tensor | None
    fixed: Tensor | None

    @classmethod
    def of(cls, part: Part, shape: tuple[int, ...]) -> Outer | None:
        """A part of gradients ``[n, *shape]``, all dimensions of ``shape`` but the first as one; None if it is none."""
        if isinstance(part, Scaled):
            left, right = (part.along, None) if part.dim == 0 else (None, part.along)
            return cls(left, right, part.fixed.reshape(shape[0], -1))
        if not isinstance(part.term, LinearFactors) or part.term.activations.shape[1] != 1 or part.term.correction:
            return None
        left, right = part.term.backprops.squeeze(1), part.term.activations.squeeze(1)
        return cls(left, right, None if part.factor is None else part.factor.expand(shape))

    @property
    def dtype(self) -> torch.dtype:
        """In which products of these add up: that of vectors and factor, or float32 where these are of 16 bits."""
        return reduce(torch.promote_types, (t.dtype for t in self if t is not None), torch.float32)

    def to(self, dtype: torch.dtype) -> Outer:
        """The same in another type."""
        return Outer(*(None if t is None else t.to(dtype) for t in self))

    def of_size_one(self) -> tuple[Outer, Tensor]:
        """The same with vectors and factor about as large as 1, and what it is to be multiplied by, ``[n]`` or ``[]``.

        Squares of each could be too large or too small for their type although that of the product is not.
        """
        left, right, fixed = self
        size: Tensor | float = 1.0
        if left is not None:
            left, largest = _of_size_one(left, 1)
            size = largest.squeeze(1).double()
        if right is not None:
            right, largest = _of_size_one(right, 1)
            size = largest.squeeze(1).double() * size
        if fixed is not None:
            fixed, largest = _of_size_one(fixed)
            size = largest.double() * size
        return Outer(left, right, fixed), torch.as_tensor(size)

    def times(self, other: Outer) -> Tensor:
        """The inner products of the gradients of two parts, ``[n]``."""
        left, right, fixed = (b if a is None else a if b is None else a * b for a, b in zip(self, other, strict=True))
        if left is not None and right is not None:
            return left.sum(1) * right.sum(1) if fixed is None else ((left @ fixed) * right).sum(1)
        assert fixed is not None
        along, dim = (left, 1) if left is not None else (right, 0)
        assert along is not None
        return along @ fixed.sum(dim)


def _of_size_one(tensor: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """A tensor divided by its largest elements along a dimension, or by the largest of all, and these; 0 stays 0."""
    largest = torch.linalg.vector_norm(tensor, torch.inf, dim, keepdim=dim is not None)
    largest = largest.clamp_min(torch.finfo(tensor.dtype).tiny)
    return tensor / largest, largest


def outer_of(parts: Sequence[Part], shape: tuple[int, ...]) -> list[Outer]:
    """Parts of gradients ``[n, *shape]``, if all of them are products of two vectors an example; else none."""
    found = [Outer.of(part, shape) for part in parts]
    known = [outer for outer in found if outer is not None]
    return known if len(known) == len(found) else []


def squared_norm_of_outer(parts: Sequence[Outer]) -> Tensor:
    """``||g_i||^2``, ``[n]``, of the sum of some parts, from products of matrices, in float64 if there are several."""
    if len(parts) == 1:
        one, size = parts[0].to(parts[0].dtype).of_size_one()
        return (one.times(one).double() * size.square()).to(one.dtype)
    wide = [part.to(torch.float64) for part in parts]
    own = torch.stack([part.times(part) for part in wide]).sum(0)
    crossed = torch.stack([first.times(second) for first, second in combinations(wide, 2)]).sum(0)
    return (own + 2 * crossed).clamp(min=0).to(parts[0].dtype)


def dense_of(parts: Sequence[Part], rows: slice) -> Tensor:
    """The sum of some gradients, of the examples in ``rows``."""
    return sum_of([part.dense(rows) for part in parts])


def _correction(term: LinearFactors | ConvFactors, part: Scaled) -> LocalCorrection:
    """Scaled rows as what is to be taken away from a term."""
    if isinstance(term, ConvFactors):
        patch: tuple[int, ...] = (term.inputs.shape[1], *term.geometry.kernel_size)
        own: tuple[int, ...] = (patch[0] // term.geometry.groups, *patch[1:])
    else:
        patch = own = (term.activations.shape[2],)
    fixed = part.fixed.reshape(-1, *own).contiguous()
    return LocalCorrection(torch.zeros_like(part.along), fixed.new_zeros(patch), -part.along, fixed)
