"""What a training step computes before its backward pass: adversarial examples, and the objective's losses on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import engm
from engm.adversarial import AWP, PGD, Adversarial, Objective, paused

from ..processes import Processes


@dataclass(eq=False)
class AttackedLosses:
    """Attack and objective as one function of a batch, the one that :func:`engm.record` takes.

    Whatever the function reads besides the batch is an attribute, because a recorded step looks at these.

    Attributes:
        model: the wrapped network.
        optimizer: the outer optimizer, for which the attack's last step measures.
        generator: source of the attack's noise.
        processes: the processes that share every batch.
        forward: how the objective calls the model.
        plain: a stand-in for ``model`` in the attack's steps that measure nothing.
        captures: whether the optimizer reads anything of single examples.
        attack: the training attack; with ``eps`` of 0 there is none.
        objective: the training loss.
        borrows: whether the attack's last step measures the norms.
        awp: perturbs the weights around the objective, if set.
        share: of a whole batch that the examples of one call are.
    """

    model: engm.GradNormModule
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    processes: Processes
    forward: nn.Module
    plain: nn.Module | None
    captures: bool
    attack: PGD
    objective: Objective
    borrows: bool
    awp: AWP | None = None
    share: float = 1.0

    def __call__(
        self, x: Tensor, y: Tensor, rows: Tensor | None = None
    ) -> Iterator[tuple[Tensor, engm.Measurement | None]]:
        """Yields the losses ``[n]``, and what the attack's last step measured; goes on after the backward pass."""
        adversarial = self.attacked(x, y)
        with self.computed(x, adversarial.inputs, y, rows) as losses:
            yield losses, adversarial.measurement

    @contextmanager
    def computed(self, x: Tensor, x_adv: Tensor, y: Tensor, rows: Tensor | None) -> Iterator[Tensor]:
        """The losses ``[n]``, in what they and their backward pass run in.

        That is perturbed weights, and no captures where none are read. What the objective keeps beside the network
        takes note of the losses.
        """
        # A method that looks at no example is timed as anybody would run it: with nothing captured.
        quiet = nullcontext() if self.captures else paused(self.model)
        perturbed: AbstractContextManager[None] = nullcontext()
        beside = self.objective.beside
        given = [] if beside is None else [beside.before(x, y, rows)]
        if self.awp is not None:
            scale = self.attack.loss_scale  # of which the length of the perturbation does not depend
            perturbed = self.awp.perturbed(
                lambda: scale * self.objective.losses(self.model, x, x_adv.detach(), y, *given)
            )
        with perturbed, quiet:
            losses = self.objective.losses(self.forward, x, x_adv, y, *given)
            if beside is not None:
                beside.after(given[0], losses, self.share)
            yield losses

    def attacked(self, x: Tensor, y: Tensor) -> Adversarial:
        """Adversarial examples of a batch ``x [n, ...]``, ``y [n]``."""
        if self.attack.eps == 0:
            return Adversarial(x.detach())
        n = len(x) * self.processes.world
        noise = None
        if self.processes.world > 1 and (self.attack.random_start or self.attack.step_noise):
            # Every process draws for the whole batch, as one process would, and takes its own rows.
            noise = self.attack.draw((n, *x.shape[1:]), self.generator, dtype=x.dtype, device=x.device)
            rows = self.processes.rows(n)
            noise = noise[:, rows] if self.attack.step_noise else noise[rows]
        measure = self.optimizer if self.borrows and isinstance(self.optimizer, engm.ExampleOptimizer) else False
        generator = self.generator if noise is None else None
        return self.attack(self.model, x, y, generator=generator, noise=noise, measure=measure, plain=self.plain)
