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


def exact_squared_norms(
    losses: Tensor,
    parameters: Sequence[Tensor],
    examples: Iterable[int] | None = None,
    scale: LossScale = UNSCALED,
) -> Tensor:
    """Squared norms of ``dL_i/dtheta_l`` by one backpropagation an example.

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
    for column, index in enumerate(indices if parameters else ()):
        gradients = torch.autograd.grad(losses[index], parameters, retain_graph=True, allow_unused=True)
        for row, gradient in enumerate(gradients):
            if gradient is not None:
                dense = gradient.to_dense() if gradient.is_sparse else gradient
                exact = dense.to(torch.promote_types(dense.dtype, dtype)).unsqueeze(0)
                result[row, column : column + 1] = squared_rows(exact)
    return scale.off_squares(result)


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
