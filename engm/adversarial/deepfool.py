"""How small a perturbation changes a network's decision, found by DeepFool, for the robustness measure rho."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .ball import check_examples, lengths, per_example
from .modes import evaluation_mode, paused

_STABILISER = 1e-8  # keeps a vanishing gradient from dividing by zero
_EXTRA_DISTANCE = 1e-4  # a step of no length would leave an example on the boundary for good


@dataclass(frozen=True)
class DeepFoolResult:
    """What DeepFool found.

    Attributes:
        inputs: perturbed examples, shaped like the inputs, detached; in [0, 1].
        distances: ``[n]``, Euclidean lengths of the perturbations, in units of the input.
        broken: ``[n]`` bool, whether the network's decision at ``inputs`` differs from the label.
    """

    inputs: Tensor
    distances: Tensor
    broken: Tensor


@dataclass(frozen=True)
class DeepFool:
    """DeepFool in the Euclidean norm, a whole batch at a time (Moosavi-Dezfooli et al., 2016, Alg. 2).

    Each step takes the network for linear where the example is now, goes to the nearest of the boundaries between the
    class that was most likely at the start and the others, and adds up these steps; the example is put at the natural
    input plus the sum times ``1 + overshoot``, and clamped to [0, 1]. An example stops where the network first errs.

    Attributes:
        steps: the largest number of steps.
        candidates: number of classes that are looked at: those most likely at the start, the class itself included.
            Each but the class itself costs a backward pass a step.
        overshoot: how far past the boundary, as a fraction of the perturbation.
    """

    steps: int = 50
    candidates: int = 10
    overshoot: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 1 or self.candidates < 2 or not self.overshoot >= 0:
            raise ValueError(
                "DeepFool needs steps >= 1, candidates >= 2 (the class itself is one) and overshoot >= 0, got "
                f"{self.steps}, {self.candidates} and {self.overshoot}"
            )

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor | None = None) -> DeepFoolResult:
        """Perturbs ``x`` until ``model``, in evaluation mode and uncaptured, errs; no ``p.grad`` is touched.

        Args:
            model: any module that maps ``x`` to logits ``[n, K]``, ``K >= 2``; its mode is restored.
            x: natural inputs ``[n, ...]``, floating point, in [0, 1].
            y: labels ``[n]``; an example that is misclassified at the start stays there, at distance 0. Default: the
                network's own decisions, so that every example moves.

        Returns:
            Perturbed examples, their distances, and which of them the network errs on.

        Raises:
            ValueError: empty or out-of-range inputs (looked at on the CPU only), labels that do not match, or fewer
                than two classes.
        """
        check_examples(x, y)
        origin = x.detach()
        x_adv = origin.clone()
        with evaluation_mode(model), paused(model), torch.enable_grad():
            classes = self._ranked(_logits(model, origin))
            labels = classes[:, 0] if y is None else y
            total = torch.zeros_like(origin)
            rows = torch.arange(len(origin), device=origin.device)
            for _ in range(self.steps):
                inputs = x_adv[rows].requires_grad_()
                logits = model(inputs)
                standing = logits.argmax(dim=1) == labels[rows]
                if not standing.any():
                    break
                step = self._to_nearest(inputs, logits.gather(1, classes[rows]))
                rows, step = rows[standing], step[standing]
                total[rows] += step
                x_adv[rows] = (origin[rows] + (1 + self.overshoot) * total[rows]).clamp(0.0, 1.0)
            broken = _logits(model, x_adv).argmax(dim=1) != labels
        return DeepFoolResult(x_adv, lengths(x_adv - origin), broken)

    def _ranked(self, logits: Tensor) -> Tensor:
        """The most likely classes ``[n, candidates]``, likeliest first."""
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(f"DeepFool needs logits [n, K] of at least two classes, got {list(logits.shape)}")
        return logits.topk(min(self.candidates, logits.shape[1]), dim=1).indices

    def _to_nearest(self, inputs: Tensor, logits: Tensor) -> Tensor:
        """The step ``[n, ...]`` to the nearest linearised boundary; logits ``[n, candidates]``, own class first."""
        differences = logits[:, 1:] - logits[:, :1]
        nearest = torch.full_like(differences[:, 0], float("inf"))
        step = torch.zeros_like(inputs)
        for k in range(differences.shape[1]):
            (gradient,) = torch.autograd.grad(differences[:, k].sum(), inputs, retain_graph=True)
            scale = lengths(gradient) + _STABILISER
            distance = differences[:, k].detach().abs() / scale
            closer = per_example(distance < nearest, step)
            nearest = torch.minimum(nearest, distance)
            step = torch.where(closer, per_example((distance + _EXTRA_DISTANCE) / scale, step) * gradient, step)
        return step


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)
