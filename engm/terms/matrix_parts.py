"""What becomes of parts of gradients on their way back through products of matrices, inverses, exponentials and slices.

All parts are of gradients ``[n, d, p]``, but for slices, which take any; see :mod:`engm.terms.parts`. None stands for
what cannot be told, or would take more room than the gradients of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import ceil, factorial, lgamma, log, log2

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_internals import decided_for_now
from .base import CHUNK_BYTES, PerExampleGradient
from .combination import sum_of
from .convolution import ConvFactors
from .linear import LinearFactors
from .parts import Part, Product, Scaled

NODES = 8, 16, 32, 64  # of quadratures; a matrix exponential is computed for each


def transposes(parts: Sequence[Part], shape: tuple[int, ...]) -> list[Part] | None:
    """The transposed gradients, of matrices of this shape."""
    found = [part.transposed(shape) for part in parts]
    known = [part for part in found if part is not None]
    return known if len(known) == len(found) else None


def of_left(parts: Sequence[Part], right: Tensor, shape: tuple[int, ...]) -> list[Part] | None:
    """Gradients of ``left [d, k]``, from those of ``left @ right``: ``g_i right^T``.

    Args:
        parts: of the product's gradients.
        right: ``[k, p]``.
        shape: of the product, ``[d, p]``.
    """
    (d, p), k = shape, right.shape[0]
    found: list[Part] = []
    for part in parts:
        if isinstance(part, Scaled) and part.dim == 0:
            found.append(Scaled(part.along, part.fixed @ right.t()))
        elif isinstance(part, Scaled):
            if min(d, k) > part.examples:
                return None
            along = part.along.unsqueeze(1)
            product = (along * part.fixed) @ right.t() if d < k else ((along * right) @ part.fixed.t()).mT
            found.append(Product(PerExampleGradient(product)))
        elif part.factor is None and isinstance(part.term, LinearFactors):
            a, b = part.term.activations, part.term.backprops
            found.append(Product(LinearFactors(a @ right.t().to(a.dtype), b)))
        elif (outer := _masked_outer(part)) is not None and k < min(d, p):
            a, b, factor = outer
            columns = (a.t().unsqueeze(2) * right.t().unsqueeze(1).to(a.dtype)).flatten(1)  # [p, n k]
            product = factor.expand(shape).to(a.dtype) @ columns
            found.append(Product(PerExampleGradient(b.unsqueeze(2) * product.view(d, -1, k).transpose(0, 1))))
        else:
            formed = _formed(part)
            if formed is None:
                return None
            right_t = right.t().to(formed.dtype)
            if p * (d + k) < d * k:
                found.append(Product(LinearFactors(right_t.expand(part.examples, p, k), formed.mT)))
            else:
                found.append(Product(PerExampleGradient(formed @ right_t)))
    return found


def of_right(parts: Sequence[Part], left: Tensor, shape: tuple[int, ...]) -> list[Part] | None:
    """Gradients of ``right [k, p]``, from those of ``left @ right``: ``left^T g_i``.

    Args:
        parts: of the product's gradients.
        left: ``[d, k]``.
        shape: of the product, ``[d, p]``.
    """
    d, p = shape
    turned: list[Part] = []
    for part in parts:
        transposed: Part | None = part.transposed(shape)
        if transposed is None:
            formed = _formed(part)
            if formed is None:
                return None
            transposed = Product(PerExampleGradient(formed.mT))
        turned.append(transposed)
    found = of_left(turned, left.t(), (p, d))
    return None if found is None else transposes(found, (p, left.shape[1]))


def of_exponential(parts: Sequence[Part], matrix: Tensor) -> list[Part] | None:
    """Gradients of ``matrix [d, d]``, from those of its exponential.

    They are ``int_0^1 exp(s A^T) g_i exp((1 - s) A^T) ds`` (Wilcox, Exponential operators and parameter differentiation
    in quantum physics, 1967). Gauss's quadrature has few nodes, since that is an entire function of ``s``, and outer
    products stay outer products.
    """
    count = _nodes_for(matrix)
    if count is None:
        return None
    nodes, weights = _gauss_legendre(count)
    largest = _largest_for(count, torch.finfo(matrix.dtype).eps)
    exponentials = _exponentials(matrix, nodes, max(0, ceil(log2(largest)) + 1))
    found: list[Part] = []
    for part in parts:
        ends = list(zip(weights, exponentials, reversed(exponentials), strict=True))
        if isinstance(part, Product) and part.factor is None and isinstance(part.term, LinearFactors):
            a, b = part.term.activations, part.term.backprops
            left = torch.cat([b @ (w * first).to(b.dtype) for w, first, _ in ends], 1)
            right = torch.cat([a @ last.t().to(a.dtype) for _, _, last in ends], 1)
            found.append(Product(LinearFactors(right, left)))
            continue
        formed = _formed(part)
        if formed is None:
            return None
        total = torch.zeros_like(formed)
        for w, first, last in ends:
            total += (w * first).t().to(formed.dtype) @ formed @ last.t().to(formed.dtype)
        found.append(Product(PerExampleGradient(total)))
    return found


def of_reflections(
    parts: Sequence[Part], vectors: Tensor, tau: Tensor, shape: tuple[int, ...], *, of_tau: bool
) -> Tensor | None:
    """Gradients of ``vectors``, or of ``tau``, from those of the product of their reflections.

    The product is ``H_1 ... H_k`` with ``H_i = I - tau_i v_i v_i^T``, of which the first ``p`` columns are taken. An
    outer product ``b a^T`` comes to ``H_i`` as ``b_i a_i^T`` with ``b_i = H_{i-1} ... H_1 b`` and
    ``a_i = H_{i+1} ... H_k a``. What is needed of those, ``b_i . v_i`` and ``a_i . v_i``, solves triangular systems
    in the inner products of the ``v``.

    Args:
        parts: of the product's gradients ``[n, m, p]``.
        vectors: ``[m, p]``, whose columns below the diagonal are those of the ``v_i`` below a one.
        tau: ``[k]``, ``k <= p``.
        shape: of the product, ``[m, p]``.
        of_tau: whose gradients are wanted.

    Returns:
        ``[n, m, p]``, or ``[n, k]``.
    """
    (m, p), k = shape, len(tau)
    v = vectors[:, :k].tril(-1)
    v.diagonal().fill_(1)
    inner = (v.t() @ v) * tau
    one = torch.eye(k, dtype=v.dtype, device=v.device)
    found = []
    for part in parts:
        if isinstance(part, Product) and part.factor is None and isinstance(part.term, LinearFactors):
            a, b = part.term.activations, part.term.backprops
        else:
            formed = _formed(part)
            if formed is None:
                return None
            a, b = torch.eye(p, dtype=formed.dtype, device=formed.device).expand(part.examples, p, p), formed.mT
        if part.examples * vectors.nbytes > CHUNK_BYTES and not of_tau:
            return None
        a, b = F.pad(a, (0, m - p)).to(v.dtype), b.to(v.dtype)  # [n, T, m]
        b_v = _solved_rows(one + inner.tril(-1), b @ v, upper=False)
        a_v = _solved_rows(one + inner.triu(1), a @ v, upper=True)
        if of_tau:
            found.append(-(b_v * a_v).sum(1))
            continue
        b_tau, a_tau = b_v * tau, a_v * tau
        between = (b_tau.mT @ a_tau).triu(1) + (a_tau.mT @ b_tau).tril(-1)
        gradient = (v @ between - b.mT @ a_tau - a.mT @ b_tau).tril(-1)
        found.append(F.pad(gradient, (0, p - k)))
    return sum_of(found)


def _solved_rows(matrix: Tensor, rows: Tensor, *, upper: bool) -> Tensor:
    """``x`` with ``matrix x = row`` for every row of ``rows [n, T, k]``, by a triangular matrix."""
    found = torch.linalg.solve_triangular(matrix, rows.flatten(0, 1).t(), upper=upper)
    return found.t().view_as(rows)


def _masked_outer(part: Part) -> tuple[Tensor, Tensor, Tensor] | None:
    """``a [n, p]``, ``b [n, d]`` and what gradients ``b_i a_i^T`` are multiplied by, element by element."""
    if not isinstance(part, Product) or part.factor is None or not isinstance(part.term, LinearFactors):
        return None
    a, b = part.term.activations, part.term.backprops
    return (a.squeeze(1), b.squeeze(1), part.factor) if a.shape[1] == 1 else None


def moved_along(
    parts: Sequence[Part],
    dim: int,
    shape: tuple[int, ...],
    change: Callable[[Tensor, int], Tensor],
    *,
    adds: bool = False,
) -> list[Part] | None:
    """What moving, cutting or padding with zeros along a dimension makes of gradients ``[n, *shape]``.

    Args:
        parts: of the gradients.
        dim: the dimension of ``shape``.
        shape: of the gradients.
        change: from a tensor and one of its dimensions to the tensor whose elements are moved along it.
        adds: whether it adds elements up.
    """
    found: list[Part] = []
    for part in parts:
        if isinstance(part, Scaled):
            if not (adds and part.dim == dim):
                numbers = change(part.along, 1) if part.dim == dim else part.along
                found.append(Scaled(numbers, change(part.fixed, dim), part.dim))
                continue
        elif part.factor is None or not adds:
            term, factor = part.term, None if part.factor is None else change(part.factor.expand(shape), dim)
            name = "backprops" if dim == 0 else "activations" if isinstance(term, LinearFactors) else "inputs"
            if isinstance(term, LinearFactors):
                found.append(Product(term.of({name: change(getattr(term, name), 2)}), factor))
                continue
            if isinstance(term, ConvFactors) and dim < 2 and term.geometry.groups == 1:
                found.append(Product(term.of({name: change(getattr(term, name), 1)}), factor))
                continue
        formed = _formed(part)
        if formed is None:
            return None
        found.append(Product(PerExampleGradient(change(formed, dim + 1))))
    return found


def _formed(part: Product | Scaled) -> Tensor | None:
    """The gradients themselves; None where there is no room for those of all examples."""
    if isinstance(part, Product) and part.factor is None and isinstance(part.term, PerExampleGradient):
        return part.term.gradient
    if part.dense(slice(0, 1)).nbytes * part.examples > CHUNK_BYTES:
        return None
    return part.dense(slice(0, part.examples))


def _nodes_for(matrix: Tensor) -> int | None:
    """How many nodes the quadrature needs, to be exact but for rounding."""
    powers = matrix.t() @ matrix
    powers = powers @ powers
    bound = torch.linalg.matrix_norm(powers @ powers) ** (1 / 8)  # of the largest singular value
    eps = torch.finfo(matrix.dtype).eps
    return next((count for count in NODES if decided_for_now(bound <= _largest_for(count, eps))), None)


def _exponentials(matrix: Tensor, times: Sequence[float], squarings: int) -> list[Tensor]:
    """``exp(t matrix)`` for several ``t`` between 0 and 1, whose series share the matrix's powers.

    That of torch 2.14.1 is off by 3e-5 in float32 where the norm is 0.5, and by 3e-10 in float64 where it is 0.05.

    Args:
        matrix: with a norm of no more than ``2^(squarings - 1)``.
        times: the ``t``.
        squarings: how often the exponential of a small part is squared.
    """
    x = matrix / 2**squarings
    powers = [torch.eye(len(x), dtype=x.dtype, device=x.device), x, x @ x]
    powers += [powers[2] @ x, powers[2] @ powers[2]]
    found = []
    for t in times:
        fourth, total = t**4 * powers[4], torch.zeros_like(x)
        for first in (12, 8, 4, 0):  # what is left out is smaller than 1e-18
            total = total @ fourth
            for k in range(4):
                total = total.add(powers[k], alpha=t**k / factorial(first + k))
        for _ in range(squarings):
            total = total @ total
        found.append(total)
    return found


@lru_cache
def _largest_for(count: int, eps: float) -> float:
    """The largest norm of a matrix for which so many nodes leave no more than ``eps`` of the integrand's largest value.

    The integrand's derivative of order ``2 count`` is smaller than ``(2 norm)^(2 count) exp(norm)``, and the error of
    the quadrature is that times ``count!^4 / ((2 count + 1) (2 count)!^3)``.
    """
    order = 2 * count
    rest = 4 * lgamma(count + 1) - log(order + 1) - 3 * lgamma(order + 1) - log(eps)
    low, high = 0.0, float(count)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if order * log(2 * middle) + middle + rest <= 0 else (low, middle)
    return low


@lru_cache
def _gauss_legendre(count: int) -> tuple[list[float], list[float]]:
    """Nodes between 0 and 1, in order, and their weights: eigenvalues of Jacobi's matrix (Golub and Welsch, 1969)."""
    k = torch.arange(1, count, dtype=torch.float64, device="cpu")
    beside = torch.diag(k / (4 * k.square() - 1).sqrt(), 1)
    values, vectors = torch.linalg.eigh(beside + beside.t())
    return ((values + 1) / 2).tolist(), vectors[0].square().tolist()
