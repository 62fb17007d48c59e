"""Expected norm and variance of per-example gradients (paper, section 2.2, Fig. 2 and Table 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import engm

from .batches import Statistics, copied, losses_of, split, wrapped


@dataclass(frozen=True)
class GradientStatistics:
    """Statistics of the gradients ``g_i`` of single examples with respect to all trained parameters.

    Attributes:
        examples: number of examples.
        loss: mean cross-entropy, nats.
        mean_norm: the paper's mu, the mean of ``||g_i||``.
        mean_squared_norm: the mean of ``||g_i||^2``.
        mean_gradient_norm: ``||g||`` of the mean gradient ``g`` of all of them.
    """

    examples: int
    loss: float
    mean_norm: float
    mean_squared_norm: float
    mean_gradient_norm: float

    @property
    def variance(self) -> float:
        """The paper's sigma^2 = E ||g_i - g||^2 = E ||g_i||^2 - ||g||^2 (Eq. 2, at these weights)."""
        return max(self.mean_squared_norm - self.mean_gradient_norm**2, 0.0)


def gradient_statistics(
    net: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 64, statistics: Statistics = "training"
) -> GradientStatistics:
    """Norms by the engine and the mean gradient by the ordinary backward pass: no per-example gradient is stored.

    Args:
        net: the network; it is copied, and nothing of it changes.
        x: ``[N, ...]``, the examples as they are to be looked at (attacked before, for adversarial training).
        y: ``[N]`` labels.
        batch_size: examples a batch; divides ``N``.
        statistics: ``"training"``: the network in training mode, gradients through the statistics of each batch; norms
            as the engine estimates them, calibrated on 16 examples of every batch. ``"evaluation"``: running
            statistics; norms are exact. The mean gradient is exact in both.

    Raises:
        ValueError: examples that do not fill whole batches, an unknown name.
    """
    with copied(net, statistics) as copy:
        model = wrapped(copy)
        parameters = [p for p in copy.parameters() if p.requires_grad]
        total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        norms, losses = [], []
        for inputs, labels in split(x, y, batch_size):
            model.calibration.forget()
            found = losses_of(model, inputs, labels)
            norms.append(engm.per_example_grad_norms(model, found).double())
            losses.append(found.detach().double())
            gradients = torch.autograd.grad(found.sum(), parameters, materialize_grads=True)
            for summed, gradient in zip(total, gradients, strict=True):
                summed += gradient
    every = torch.cat(norms)
    mean_gradient = torch.stack([(summed / len(x)).square().sum() for summed in total]).sum().sqrt()
    return GradientStatistics(
        len(x),
        torch.cat(losses).mean().item(),
        every.mean().item(),
        every.square().mean().item(),
        mean_gradient.item(),
    )
