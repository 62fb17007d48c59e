"""What every term can do: norms, weighted sums and slices of per-example gradients that it need not hold.

Besides the base class here are the term that does hold its gradients, and what terms made of factors share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

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
        scale: ``[n, d]``, ``k v_i`` with ``v_i`` the example's gradient of the batch norm's scale.
        correlation: ``[d, C / groups, *kernel]`` (linear: ``[d, p]``), the mean of ``xhat a^T`` over batch and
            positions, with ``xhat`` the normalised output and ``a`` the patch.
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

    def regrouped(self, owners: Owners) -> Term:  # TEMPORARY
        dense = self.dense(slice(0, self.examples))
        known = owners.of >= 0
        out = dense.new_zeros(owners.n, *dense.shape[1:])
        return PerExampleGradient(out.index_add(0, owners.of[known], dense[known]))

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

    def compact(self) -> Term:
        """The smallest equivalent term, to be kept until the weights are known.

        An example's gradient may have fewer elements than its factors: 9,216 against 65,536 for a 3x3 convolution of
        32 channels at 32x32. Then the gradient itself is formed, in the same pass that yields its norm. The gradient
        takes less memory, and its weighted sum is one matrix-vector product instead of a second convolution.
        """
        return self


def squared_rows(gradients: Tensor) -> Tensor:
    """``||g_i||^2``, ``[n]``, of gradients ``[n, *parameter.shape]``, which may have no further dimension."""
    rows = gradients.unsqueeze(-1).flatten(1)
    return rows.to(accumulation_dtype(rows)).square().sum(1)


def squared_norm_of_dense(term: Term) -> Tensor:
    """``||g_i||^2``, ``[n]``, from the gradients themselves, at most :data:`CHUNK_BYTES` of them at once."""
    n, start, chunk = term.examples, 0, 1
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


def cheaper_to_scale(backprops: Tensor, activations: Tensor) -> Tensor:
    """The smaller factor; in float16 always the backprops, which the loss scale keeps clear of underflow."""
    if backprops.dtype == torch.float16 or backprops.numel() <= activations.numel():
        return backprops
    return activations


class Factors(Term):
    """A term of factors whose product is the gradient: weighting the examples of one factor weights the gradients."""

    def to_scale(self) -> Tensor:
        """The factor whose examples are weighted."""
        raise TypeError(f"{type(self).__name__} must define to_scale")

    def sum_of_scaled(self, scaled: Tensor) -> Tensor:
        """The sum over examples, given :meth:`to_scale` times the examples' weights."""
        raise TypeError(f"{type(self).__name__} must define sum_of_scaled")

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.sum_of_scaled(ops.scale_examples([self.to_scale()], weights)[0])


class PositionFactors(Factors):
    """A term of factors whose gradient is a sum over positions.

    Uses of one parameter are joined, and rows of one example folded, by laying their positions side by side.

    Attributes:
        by_position: names of the attributes that have positions, each a tensor ``[n, T, ...]``.
    """

    by_position: ClassVar[tuple[str, ...]]

    @property
    def examples(self) -> int:
        return getattr(self, self.by_position[0]).shape[0]

    def joined(self, others: Sequence[Self]) -> Self:
        """The term of all positions of this term and of ``others``, which are of the same kind."""
        tensors = {name: torch.cat([getattr(t, name) for t in (self, *others)], 1) for name in self.by_position}
        return replace(self, **tensors)  # type: ignore[type-var]

    def _folded(self, outer: int, n: int, inner: int) -> Self:
        tensors = {}
        for name in self.by_position:
            tensor = getattr(self, name)
            split = tensor.unflatten(0, (outer, n, inner)).transpose(0, 1)
            tensors[name] = split.flatten(1, 3)
        return replace(self, **tensors)  # type: ignore[type-var]


def refuse_correction(correction: LocalCorrection | None) -> None:
    """Refuses to fold a term with a local correction.

    Raises:
        ValueError: there is a correction.
    """
    if correction is not None:
        raise ValueError("a term with a local batch-norm correction cannot be folded: correct the folded term instead.")
