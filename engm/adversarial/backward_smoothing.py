"""How the start of an attack is chosen by backward smoothing, in the space of outputs.

Source: Chen et al., *Efficient Robust Training via Backward Smoothing*, AAAI 2022 (arXiv 2010.01278), and
``trades_backward.py`` of its authors' code (jinghuichen/BackwardSmoothing, commit c9c76f7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .attacks import PGD, Problem
from .losses import kl_divergence, log_probabilities
from .modes import paused


@dataclass(frozen=True)
class BackwardSmoothing(PGD):
    """PGD on ``KL(p(x) || p(x'))`` that starts where the network's output is a random one near ``p(x)``.

    A start that is drawn at random in the ball smooths the inner problem, but only as far as the ball allows. Here what
    is drawn is an output, ``softmax(z(x) + gamma u)`` with ``u`` uniform in ``[-1, 1]``, and the start is the point to
    which one step of ``step_size`` leads from ``x`` towards it: down the gradient of ``KL(softmax(z(x) + gamma u) ||
    p(x'))``. As published one step follows, and both are as long as the radius.

    Attributes:
        loss: ``"kl"``, which is maximised from there on.
        gamma: size of the change of the logits, in units of logits.
        classes: number of logits, which :meth:`draw` has to know beforehand; a call of the attack does without.
    """

    loss: str = "kl"  # type: ignore[assignment]  # one of those that PGD knows
    gamma: float = 1.0
    classes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss != "kl":
            raise ValueError(f"BackwardSmoothing maximises loss='kl', got {self.loss!r}: use PGD for another loss")
        if not 0 < self.gamma < inf:
            raise ValueError(f"BackwardSmoothing needs a finite gamma > 0, got {self.gamma}")
        if self.start_noise is not None or self.step_noise or not self.random_start:
            raise ValueError(
                "BackwardSmoothing chooses its start itself: leave start_noise, step_noise and random_start out"
            )

    def draw(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Tensor:
        """The ``u`` of a run, ``[n, classes]``, drawn from the generator as a run does.

        Args:
            shape: of the inputs, ``[n, ...]``.
            generator: source of the noise; may live on the CPU while the noise does not. Default: torch's own of
                ``device``.
            dtype: of the inputs.
            device: of the inputs.

        Raises:
            ValueError: the attack does not know the number of classes.
        """
        if self.classes is None:
            raise ValueError("BackwardSmoothing draws a number for every logit: make it with classes=...")
        return _drawn((shape[0], self.classes), generator, dtype, device)

    def _shape_of_noise(self, x: Tensor) -> tuple[int, ...]:
        return (len(x), self.classes or 0)

    def _start(
        self, problem: Problem, generator: torch.Generator | None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        x, natural = problem.origin, problem.natural
        if natural is None:
            raise RuntimeError("an attack on loss='kl' must know the prediction at the natural inputs")
        if noise is None:
            noise = _drawn(natural.shape, generator, x.dtype, x.device)
        target = log_probabilities(natural + self.gamma * noise.to(natural.dtype))
        with paused(problem.model):
            point = x.detach().requires_grad_()
            nearness = -kl_divergence(target, log_probabilities(problem.plain(point)))
            (gradient,) = torch.autograd.grad(nearness, point, torch.full_like(nearness, self.loss_scale))
        return self._ascend(x, x, gradient, None), None


def _drawn(
    size: Sequence[int], generator: torch.Generator | None, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Uniform in [-1, 1)."""
    source = device if generator is None else generator.device
    return 2 * torch.rand(tuple(size), generator=generator, device=source, dtype=dtype).to(device) - 1
