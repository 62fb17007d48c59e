"""Norms of per-example gradients by their definition: one backpropagation an example, through the batch's statistics.

This is the oracle that the engine is held against, what calibration measures a few examples with, and what
``batch_norm="exact"`` runs on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .loss_checks import check_losses
from .terms import accumulation_dtype, squared_rows
from .terms.loss_scale import UNSCALED, LossScale
from .torch_internals import adds_up

BATCHED_BELOW = 1 << 15  # with fewer elements in all parameters, chunks by vmap are faster than a loop on a CPU
CHUNK = 16  # examples backpropagated at once


def exact_squared_norms(
    losses: Tensor,
    parameters: Sequence[Tensor],
    examples: Iterable[int] | None = None,
    scale: LossScale = UNSCALED,
) -> Tensor:
    """Squared norms of ``dL_i/dtheta_l`` by one backpropagation an example, in chunks of batched passes where faster.

    Args:
        losses: ``[n]``, with a graph; the graph is kept.
        parameters: the tensors ``theta_l``; those that the losses do not reach have norm 0.
        examples: which examples; default all.
        scale: the factor that the losses have inside of the passes; norms are freed of it.

    Returns:
        ``[len(parameters), number of examples]``, float64 for float64 losses, else float32.
    """
    losses = scale.scaled(losses)
    indices = list(range(losses.shape[0]) if examples is None else examples)
    dtype = accumulation_dtype(losses)
    result = torch.zeros(len(parameters), len(indices), dtype=dtype, device=losses.device)
    if not parameters or not indices:
        return result
    done = 0
    while done < len(indices):
        chunk, gradients = _next_gradients(losses, parameters, indices[done:])
        for row, gradient in enumerate(gradients):
            if gradient is not None:
                result[row, done : done + len(chunk)] = squared_rows(
                    gradient.to(torch.promote_types(gradient.dtype, dtype))
                )
        done += len(chunk)
    return scale.off_squares(result)


def _next_gradients(
    losses: Tensor, parameters: Sequence[Tensor], indices: list[int]
) -> tuple[list[int], list[Tensor | None]]:
    """The first few of ``indices`` and these examples' gradients, ``[few, *shape]`` or None for every parameter."""
    if sum(parameter.numel() for parameter in parameters) < BATCHED_BELOW:
        chunk = indices[:CHUNK]
        rows = torch.zeros(len(chunk), losses.shape[0], dtype=losses.dtype, device="cpu")
        rows[range(len(chunk)), chunk] = 1
        rows = rows.to(losses.device, non_blocking=True)
        try:
            batched = torch.autograd.grad(
                losses, parameters, rows, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:
            pass  # part of the graph cannot be batched; if it cannot be backpropagated at all, the loop raises that
        else:
            if _all_add_up(batched, losses, parameters, rows):
                return chunk, list(batched)
    found = torch.autograd.grad(losses[indices[0]], parameters, retain_graph=True, allow_unused=True)
    dense = [None if g is None else g.to_dense() if g.is_sparse else g for g in found]
    return indices[:1], [None if gradient is None else gradient.unsqueeze(0) for gradient in dense]


def _all_add_up(batched: Sequence[Tensor | None], losses: Tensor, parameters: Sequence[Tensor], rows: Tensor) -> bool:
    """Whether batched gradients sum to the gradients of the summed losses, which for some operators they do not."""
    whole = torch.autograd.grad(losses, parameters, rows.sum(0), retain_graph=True, allow_unused=True)
    return all(b is None or w is None or adds_up(b, w) for b, w in zip(batched, whole, strict=True))


def naive_grad_norms(model: nn.Module, losses: Tensor) -> Tensor:
    """Norms of the per-example gradients by one backpropagation an example: the oracle, and slow.

    In training-mode batch norm this is ``||dL_i/dtheta||`` through the batch's statistics, the paper's quantity.

    Args:
        model: any module; the norms are over its parameters that require grad.
        losses: ``[n]``, one loss an example, with a graph; the graph is kept.

    Returns:
        ``[n]``, float64 for float64 losses, else float32.

    Raises:
        ValueError: ``losses`` is not a vector with a graph.
        RuntimeError: the network is split by ``fully_shard``.
    """
    check_losses(losses)
    if getattr(model, "shard_group", None) is not None:
        raise RuntimeError(
            "under fully_shard every process would have to backpropagate equally often, once an example: compare with "
            "a copy of the network that is not split."
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return exact_squared_norms(losses, parameters).sum(0).sqrt()
