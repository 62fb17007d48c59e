"""What every term can do: norms, weighted sums and slices of per-example gradients that it need not hold.

Besides the base class here is the term that does hold its gradients. :mod:`engm.terms.factors` has what terms made of
factors share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import accumulation_dtype
from .owners import Owners, Ownership

CHUNK_BYTES = 64 << 20  # of per-example gradients that are formed at once where they have to be formed


@dataclass
class LocalCorrection:
    """What a batch norm in training mode behind a layer subtracts from the layer's per-example gradients ``G_i``.

    The corrected gradient is ``G_i[o] - shift[i, o] * patch_mean - scale[i, o] * correlation[o]``: the exact backward
    pass of that one batch norm, where ``G_i`` alone takes its statistics for constants. Below, ``sigma`` is the batch
    norm's standard deviation and ``k`` its scale divided by ``sigma``.

    Attributes:
        shift: ``[n, d]``, ``k m_i`` with ``m_i`` the example's gradient of the batch norm's shift.
        patch_mean: ``[C, *kernel]`` (linear: ``[p]``), the mean patch over batch and positions.
        scale: ``[n, d]``, ``k v_i / N`` with ``v_i`` the example's gradient of the batch norm's scale and ``N`` the
            root of the number of rows, examples times positions.
        correlation: ``[d, C / groups, *kernel]`` (linear: ``[d, p]``), ``N`` times the mean of ``xhat a^T`` over the
            rows, with ``xhat`` the normalised output and ``a`` the patch.
    """

    shift: Tensor
    patch_mean: Tensor
    scale: Tensor
    correlation: Tensor

    def as_arguments(self) -> dict[str, Any]:
        """Keyword arguments of :func:`engm.ops.linear_norm_sq` and :func:`engm.ops.conv_norm_sq`."""
        return {
            "shift": self.shift,
            "patch_mean": self.patch_mean,
            "scale": self.scale,
            "correlation": self.correlation,
        }

    def corrected(self, gradients: Tensor, rows: slice) -> Tensor:
        """The corrected gradients of the examples in ``rows``, from uncorrected ``gradients [rows, d, *]``."""
        d, *own = self.correlation.shape
        groups = self.patch_mean.shape[0] // own[0]
        patches = self.patch_mean.reshape(groups, *own).repeat_interleave(d // groups, 0)
        shape = [-1, d] + [1] * len(own)
        shift, scale = self.shift[rows].view(shape), self.scale[rows].view(shape)
        return gradients - shift * patches - scale * self.correlation


class Term:
    """What stands for the per-example gradients ``g_i`` of one parameter; :mod:`engm.terms` lists the kinds."""

    @property
    def examples(self) -> int:
        """Number of examples ``n``."""
        raise TypeError(f"{type(self).__name__} must define examples")

    def squared_norm(self) -> Tensor:
        """``||g_i||^2``, ``[n]``, in float32 or better."""
        raise TypeError(f"{type(self).__name__} must define squared_norm")

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``sum_i weights_i g_i`` in the parameter's own shape."""
        raise TypeError(f"{type(self).__name__} must define weighted_sum")

    def dense(self, rows: slice) -> Tensor:
        """The per-example gradients themselves of the examples in ``rows``, ``[rows, *parameter.shape]``."""
        raise TypeError(f"{type(self).__name__} must define dense")

    def fold(self, outer: int, n: int, inner: int) -> Term:
        """The term of ``n`` examples, where this one counts ``outer * n * inner`` rows of a batch as examples.

        An example's gradient is the sum over its rows. The term itself is returned where every example has one row.

        Args:
            outer: how often the whole batch is repeated.
            n: number of examples.
            inner: how many rows of one example lie side by side.

        Raises:
            ValueError: the term has not ``outer * n * inner`` rows, or carries a local correction, which holds for
                the gradients of single rows alone.
        """
        if outer * n * inner != self.examples:
            raise ValueError(
                f"a term of {self.examples} rows cannot be folded to {outer} x {n} x {inner} (outer, examples, inner)."
            )
        return self if outer * inner == 1 else self._folded(outer, n, inner)

    def grouped(self, ownership: Ownership) -> Term:
        """The term of the examples, where this one counts the rows of a batch as examples.

        Args:
            ownership: in which rows the examples lie, along the first dimension alone.

        Raises:
            ValueError: see :meth:`fold`.
        """
        if isinstance(ownership, Owners):
            return self.regrouped(ownership)
        rows = ownership.outer * ownership.inner
        return self.fold(ownership.outer, self.examples // rows, ownership.inner)

    def _folded(self, outer: int, n: int, inner: int) -> Term:
        """What :meth:`fold` returns where an example has several rows."""
        raise TypeError(f"{type(self).__name__} must define _folded")

    def regrouped(self, owners: Owners) -> Term:
        """The term of ``owners.n`` examples, where this one counts the rows of a batch as examples.

        An example's gradient is the sum over the rows that it owns, in whatever order these lie; it is zero where the
        example owns none. :meth:`fold` is the cheaper method where the rows lie in a regular order.

        Args:
            owners: of the rows, which are taken in the order of ``owners.of.flatten()``. The gradients of rows that
                belong to nobody must be finite.

        Raises:
            ValueError: the term has not one row an owner, or carries a local correction, which holds for the gradients
                of single rows alone.
        """
        if owners.of.numel() != self.examples:
            raise ValueError(f"a term of {self.examples} rows cannot be regrouped by {owners.of.numel()} owners.")
        return self._regrouped(owners)

    def _regrouped(self, owners: Owners) -> Term:
        """What :meth:`regrouped` returns."""
        raise TypeError(f"{type(self).__name__} must define _regrouped")

    def compact(self) -> Term:
        """The smallest equivalent term, to be kept until the weights are known.

        An example's gradient may have fewer elements than its factors: 9,216 against 65,536 for a 3x3 convolution of
        32 channels at 32x32. Then the gradient itself is formed, in the same pass that yields its norm. The gradient
        takes less memory, and its weighted sum is one matrix-vector product instead of a second convolution.
        """
        return self


def squared_rows(gradients: Tensor) -> Tensor:
    """``||g_i||^2``, ``[n]``, of gradients ``[n, *parameter.shape]``, which may have no further dimension."""
    rows = gradients.unsqueeze(-1).flatten(1).to(accumulation_dtype(gradients))
    return (torch.view_as_real(rows.resolve_conj()).flatten(1) if rows.is_complex() else rows).square().sum(1)


def squared_norm_of_dense(term: Term, chunk: int = 1) -> Tensor:
    """``||g_i||^2``, ``[n]``, from the gradients themselves, at most :data:`CHUNK_BYTES` of them at once.

    Args:
        term: of the gradients.
        chunk: of how many examples the gradients are formed first, where their size is not known.
    """
    n, start = term.examples, 0
    found = []
    while start < n:
        gradients = term.dense(slice(start, min(start + chunk, n)))
        start += len(gradients)
        found.append(squared_rows(gradients))
        chunk = max(1, CHUNK_BYTES // max(1, gradients[0].nbytes))
    return torch.cat(found)


@dataclass
class PerExampleGradient(Term):
    """The per-example gradients themselves, for small parameters.

    Attributes:
        gradient: ``[n, *parameter.shape]``.
        norm_sq: ``[n]``, the squared norms, if they are known.
    """

    gradient: Tensor
    norm_sq: Tensor | None = None

    @property
    def examples(self) -> int:
        return self.gradient.shape[0]

    def squared_norm(self) -> Tensor:
        return squared_rows(self.gradient) if self.norm_sq is None else self.norm_sq

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return ops.weighted_sums([self.gradient], weights)[0]

    def dense(self, rows: slice) -> Tensor:
        return self.gradient[rows]

    def _folded(self, outer: int, n: int, inner: int) -> Term:
        split = self.gradient.unflatten(0, (outer, n, inner))
        return PerExampleGradient(split.sum((0, 2), dtype=accumulation_dtype(split)))

    def _regrouped(self, owners: Owners) -> Term:
        return PerExampleGradient(owners.sums(self.gradient.to(accumulation_dtype(self.gradient))))
