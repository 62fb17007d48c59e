"""Per-example gradients of a tensor as a sum of parts, each as small as the factors of a layer's gradients.

They are what gradients become on their way from a weight that a layer reads to the parameters that the weight was
computed from (:mod:`engm.rules.in_factors`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LocalCorrection, Term, squared_rows
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

    def by_row(self, matrix: Tensor) -> Tensor:
        """The sums of every row of the gradients times the same row of ``matrix [d, *rest]``, ``[n, d]``."""
        term, matrix = self.term, matrix if self.factor is None else matrix * self.factor
        if isinstance(term, LinearFactors):
            return (term.backprops * (term.activations @ matrix.to(term.activations.dtype).t())).sum(1)
        if isinstance(term, ConvFactors):
            return (term.backprops * _convolved(term, matrix)).flatten(2).sum(2)
        chunks = [term.dense(rows) for rows in _chunks(term.examples, matrix.numel())]
        return torch.cat([(part * matrix).reshape(len(part), len(matrix), -1).sum(2) for part in chunks])

    def dense(self, rows: slice) -> Tensor:
        """The gradients of some examples."""
        found = self.term.dense(rows)
        return found if self.factor is None else found * self.factor


@dataclass
class ScaledRows:
    """Per-example gradients ``[n, d, *rest]`` whose row ``o`` is ``along[i, o]`` times that of a fixed matrix.

    Attributes:
        along: ``[n, d]``.
        fixed: ``[d, *rest]``.
    """

    along: Tensor
    fixed: Tensor

    @property
    def examples(self) -> int:
        return self.along.shape[0]

    def times(self, factor: Tensor, shape: tuple[int, ...]) -> ScaledRows:
        """The gradients times what is broadcast to their shape."""
        return ScaledRows(self.along, self.fixed * factor)

    def by_row(self, matrix: Tensor) -> Tensor:
        """As :meth:`Product.by_row`."""
        return self.along * (self.fixed * matrix).reshape(len(matrix), -1).sum(1)

    def dense(self, rows: slice) -> Tensor:
        """The gradients of some examples."""
        along = self.along[rows]
        return along.view(*along.shape, *[1] * (self.fixed.dim() - 1)) * self.fixed

    def as_product(self) -> Product:
        """Of a matrix whose rows are all the same: outer products."""
        a = self.fixed[:1].expand(self.examples, -1).unsqueeze(1)
        return Product(LinearFactors(a, self.along.unsqueeze(1)))


Part = Product | ScaledRows


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


def squared_norm_of(parts: Sequence[Part], shape: tuple[int, ...]) -> Tensor:
    """``||g_i||^2``, ``[n]``, of the sum of some gradients ``[n, *shape]``."""
    products: list[Product] = []
    fixed: list[ScaledRows] = []
    for part in parts:
        if isinstance(part, ScaledRows) and len(shape) == 2 and is_constant(part.fixed, 0):
            part = part.as_product()
        if isinstance(part, Product):
            products.append(part)
        else:
            fixed.append(part)
    plain = all(part.factor is None for part in products)
    if plain and products:
        whole = combine([part.term for part in products])
        if not fixed:
            return whole.squared_norm()
        if len(fixed) == 1 and isinstance(whole, LinearFactors | ConvFactors):
            return replace(whole, correction=_correction(whole, fixed[0])).squared_norm()
    if not products and len(fixed) == 1:
        return fixed[0].along.square() @ fixed[0].fixed.reshape(shape[0], -1).square().sum(1)
    if len(products) == 1 and not fixed and products[0].factor is not None:
        term, factor = products[0].term, products[0].factor
        if isinstance(term, LinearFactors) and term.activations.shape[1] == 1:
            a, b = term.activations.squeeze(1).square(), term.backprops.squeeze(1).square()
            return ((b @ factor.expand(shape).square()) * a).sum(1)
    return torch.cat([squared_rows(dense_of(parts, rows)) for rows in _chunks(parts[0].examples, prod(shape))])


def dense_of(parts: Sequence[Part], rows: slice) -> Tensor:
    """The sum of some gradients, of the examples in ``rows``."""
    return sum_of([part.dense(rows) for part in parts])


def _correction(term: LinearFactors | ConvFactors, part: ScaledRows) -> LocalCorrection:
    """Scaled rows as what is to be taken away from a term."""
    if isinstance(term, ConvFactors):
        patch: tuple[int, ...] = (term.inputs.shape[1], *term.geometry.kernel_size)
        own: tuple[int, ...] = (patch[0] // term.geometry.groups, *patch[1:])
    else:
        patch = own = (term.activations.shape[2],)
    fixed = part.fixed.reshape(-1, *own).contiguous()
    return LocalCorrection(torch.zeros_like(part.along), fixed.new_zeros(patch), -part.along, fixed)
