"""The rules of normalisation layers: gradients of scale and shift, from a layer's input and its statistics.

With ``xhat = (x - mean) * rstd`` an example's scale gradient is ``sum_t gy_t xhat_t`` and its shift gradient
``sum_t gy_t``; both are ``[n, C]`` and small, so they are kept as they are. The statistics are those
that the layer saved for its own backward pass; where it saved none they are computed once more.
"""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..checks import RefusedError
from ..terms import PerExampleGradient, Term, accumulation_dtype
from ..torch_internals import (
    BATCH_NORMS,
    Statistics,
    batch_norm_statistics,
    hooks_pack_what_is_saved,
    is_narrow,
    is_sync_batch_norm,
    rank_without_batch,
    saved_option,
    saved_rstd,
    saved_statistics,
)
from .base import INPUT, Rule, add_rule


def affine_terms(
    views: tuple[Tensor, Tensor, Tensor | None, Tensor, int],
    names: tuple[str, ...],
    shape: tuple[int, ...] | None = None,
) -> dict[str, Term]:
    """Terms of scale and shift.

    Args:
        views: the arguments of :func:`engm.ops.affine_norm_sq`.
        names: which of ``"weight"`` (the scale) and ``"bias"`` (the shift) are wanted.
        shape: of the parameters, if it is not ``[C]``.
    """
    x, gy, mean, rstd, channel_dim = views
    # CUDA's autocast runs group and layer norm in float32 on inputs of 16 bits: what the layer normalised was x cast.
    norm_sq, scale, shift = ops.affine_norm_sq(ops.in_type(x, gy.dtype), gy, mean, rstd, channel_dim)
    norm_of_scale, norm_of_shift = norm_sq.unbind(0)
    found = {"weight": (scale, norm_of_scale), "bias": (shift, norm_of_shift)}
    if shape is not None and len(shape) != 1:
        found = {name: (gradient.view(-1, *shape), norm) for name, (gradient, norm) in found.items()}
    return {name: PerExampleGradient(*found[name]) for name in names}


def by_channel(
    x: Tensor, gy: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, int]:
    """The arguments of :func:`engm.ops.affine_norm_sq`, as views of tensors in their own memory format.

    Args:
        x: input of the layer, ``[n, C, *S]``.
        gy: gradient of the layer's output, ``[n, C, *S]``.
        mean: ``[n or 1, C]``, or None for 0.
        rstd: ``[n or 1, C]``.
    """
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        rows = [t.permute(0, 2, 3, 1).flatten(1, 2) for t in (x, gy)]
        return rows[0], rows[1], None if mean is None else mean.unsqueeze(1), rstd.unsqueeze(1), 2
    if x.dim() == 2:
        x, gy = x.unsqueeze(2), gy.unsqueeze(2)
    return x.flatten(2), gy.flatten(2), None if mean is None else mean.unsqueeze(2), rstd.unsqueeze(2), 1


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether a batch norm takes its statistics from the batch: in training mode, or if it keeps no running ones."""
    return module.training or getattr(module, "running_mean", None) is None


def _running_statistics(module: Any) -> tuple[Tensor, Tensor]:
    """Running mean and reciprocal standard deviation, ``[C]``, as they are now."""
    variance = module.running_var
    return module.running_mean.clone(), torch.rsqrt(variance.to(accumulation_dtype(variance)) + module.eps)


def _statistics_of(x: Tensor, dims: list[int], eps: float, *, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of ``x`` over ``dims``, in float32 or better."""
    var, mean = torch.var_mean(x.to(accumulation_dtype(x)), dims, correction=0, keepdim=keepdim)
    return mean, torch.rsqrt(var + eps)


@add_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNormRule(Rule):
    """Statistics of the batch (training mode, or none kept) or running ones; ``[n, C, *S]`` or ``[n, C]``."""

    operators: ClassVar = dict.fromkeys(BATCH_NORMS, (INPUT, "weight", "bias"))

    def couples(self, module: nn.Module) -> bool:
        return uses_batch_statistics(module)

    def save(self, module: Any, activations: Tensor, output: Tensor) -> Statistics:
        if not uses_batch_statistics(module):
            return _running_statistics(module)
        saved = saved_statistics(output, "NativeBatchNormBackward")
        if saved is not None:
            return saved
        known = None if hooks_pack_what_is_saved() else batch_norm_statistics(output.grad_fn)
        if known is not None:
            return known[:2]
        return _statistics_of(activations.detach(), [0, *range(2, activations.dim())], module.eps)

    def terms(
        self,
        module: nn.Module,
        activations: Tensor,
        backprops: Tensor,
        saved: Any,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        mean, rstd = saved
        return affine_terms(by_channel(activations, backprops, mean.unsqueeze(0), rstd.unsqueeze(0)), names)


@add_rule(nn.SyncBatchNorm)
class SyncBatchNormRule(BatchNormRule):
    """A batch norm that in training mode takes its statistics from the batches of all processes of a group.

    Frozen statistics are those of all processes, so frozen norms are the same however the batch is split.
    """

    def save(self, module: Any, activations: Tensor, output: Tensor) -> Statistics:
        node = output.grad_fn
        if node is not None and is_sync_batch_norm(node) and hooks_pack_what_is_saved():
            raise RefusedError(
                "engm: nn.SyncBatchNorm over several processes runs where hooks pack what autograd saves "
                "(torch.utils.checkpoint, save_on_cpu), which hides the statistics of all processes. Leave the layer "
                "out of the checkpointed part, or use nn.BatchNorm."
            )
        return super().save(module, activations, output)


@add_rule(nn.GroupNorm)
class GroupNormRule(Rule):
    """Statistics of each example's groups of channels; ``[n, C, *S]``."""

    options = ("num_groups",)
    operators: ClassVar = {"NativeGroupNorm": (INPUT, "weight", "bias")}

    def describes(self, module: Any, node: Any, activations: Any, shape: tuple[int, ...]) -> bool:
        same = saved_option(node, "group") == module.num_groups
        return same and super().describes(module, node, activations, shape)

    def save(self, module: Any, activations: Tensor, output: Tensor) -> Statistics:
        saved = saved_statistics(output, "NativeGroupNormBackward")
        if saved is None:
            x = activations.detach()
            saved = _statistics_of(x.unflatten(1, (module.num_groups, -1)).flatten(2), [2], module.eps)
        return saved

    def terms(
        self,
        module: Any,
        activations: Tensor,
        backprops: Tensor,
        saved: Any,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        groups, per_group = module.num_groups, activations.shape[1] // module.num_groups
        mean, rstd = (t.view(-1, groups, 1).expand(-1, -1, per_group).flatten(1) for t in saved)
        return affine_terms(by_channel(activations, backprops, mean, rstd), names)


@add_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormRule(Rule):
    """Statistics of each example's channels, or running ones in evaluation mode; ``[n, C, *S]``."""

    always = True  # torch computes an instance norm as a batch norm of one example
    operators: ClassVar = dict.fromkeys(BATCH_NORMS, (INPUT, "weight", "bias"))
    on_parameters = frozenset(["Repeat"])

    def misses_batch(self, module: Any, output: Tensor) -> bool:
        return output.dim() == rank_without_batch(module)

    def save(self, module: Any, activations: Tensor, output: Tensor) -> Statistics:
        of_input = module.training or not module.track_running_stats or module.running_mean is None
        if not of_input:
            mean, rstd = _running_statistics(module)
            return mean.unsqueeze(0), rstd.unsqueeze(0)
        x = activations.detach()
        x = x.unsqueeze(0) if self.misses_batch(module, x) else x
        return _statistics_of(x.flatten(2), [2], module.eps)

    def terms(
        self,
        module: nn.Module,
        activations: Tensor,
        backprops: Tensor,
        saved: Any,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        mean, rstd = saved
        return affine_terms(by_channel(activations, backprops, mean, rstd), names)


class _TrailingNormRule(Rule):
    """What the norms over trailing dimensions share; the dimensions between these and the batch are positions."""

    options = ("normalized_shape",)

    positionwise = True

    def describes(self, module: Any, node: Any, activations: Any, shape: tuple[int, ...]) -> bool:
        saved = saved_option(node, "normalized_shape")
        same = saved is None or saved == tuple(module.normalized_shape)
        return same and super().describes(module, node, activations, shape)

    def terms(
        self,
        module: Any,
        activations: Tensor,
        backprops: Tensor,
        saved: Any,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        n, shape = backprops.shape[0], tuple(module.normalized_shape)
        positions = prod(backprops.shape[1 : backprops.dim() - len(shape)])
        x, gy = activations, backprops
        if x.dim() != 3 or len(shape) != 1:
            x, gy = (t.reshape(n, positions, prod(shape)) for t in (x, gy))
        mean, rstd = saved
        mean = None if mean is None else mean.reshape(n, positions, 1)
        return affine_terms((x, gy, mean, rstd.reshape(n, positions, 1), 2), names, shape)


@add_rule(nn.LayerNorm)
class LayerNormRule(_TrailingNormRule):
    """Statistics over the trailing ``normalized_shape``; ``[n, *, *normalized_shape]``."""

    operators: ClassVar = {"NativeLayerNorm": (INPUT, "weight", "bias")}

    def save(self, module: Any, activations: Tensor, output: Tensor) -> Statistics:
        saved = saved_statistics(output, "NativeLayerNormBackward")
        if saved is None:
            dims = list(range(-len(module.normalized_shape), 0))
            saved = _statistics_of(activations.detach(), dims, module.eps, keepdim=True)
        return saved


@add_rule(nn.RMSNorm)
class RMSNormRule(_TrailingNormRule):
    """The root mean square over the trailing ``normalized_shape``; there is no mean and no shift."""

    parameter_names = ("weight",)
    input_name = "x"
    operators: ClassVar = {"FusedRmsNorm": (INPUT, "weight"), "Mul": (INPUT, "weight")}
    on_inputs = frozenset(["Mul", "Rsqrt", "Add", "Mean", "Pow"])

    def save(self, module: Any, activations: Tensor, output: Tensor) -> Statistics:
        rstd = saved_rstd(output)
        if rstd is not None and not is_narrow(rstd):
            return None, rstd
        x = activations.detach()
        x = x if rstd is None else x.to(rstd.dtype)  # the layer saw its input in that dtype
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        dims = list(range(-len(module.normalized_shape), 0))
        mean_square = x.to(accumulation_dtype(x)).square().mean(dims, keepdim=True)
        return None, torch.rsqrt(mean_square + eps)
