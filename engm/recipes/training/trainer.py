"""One model and how it takes a training step: attack, loss, outer optimizer, and the figures of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import engm
from engm.adversarial import AWP, PGD, VANILLA, Objective
from engm.checks import NonFiniteError
from engm.module import couples

from ..processes import Processes
from .attacked import AttackedLosses
from .clock import StepClock
from .loggers import Figures, Logger
from .recorded import Recorder, StepReport
from .step_figures import Examples, StepFigures, joined, pack, skipped, together, unpack


@dataclass(frozen=True)
class EpochRecord:
    """Figures of one epoch of training, means over its examples.

    Attributes:
        loss: adversarial training loss, nats.
        mean_weight: mean of ``w_i``; 1 for methods that do not weigh.
        fraction_clipped: share of examples with ``w_i < 1``.
        mean_norm: mean of the norms that the weights were made from, or ``None`` for methods without.
        lr: learning rate of the epoch's last step.
        step_seconds: seconds of every step: attack, backward pass and update.
        summary: these and more, by the names that logs use: quantiles of weights, norms and input norms.
    """

    loss: float
    mean_weight: float
    fraction_clipped: float
    mean_norm: float | None
    lr: float
    step_seconds: list[float]
    summary: dict[str, float] = field(default_factory=dict)


class Trainer:
    """One model, its outer optimizer and its attack.

    Args:
        model: the wrapped network.
        optimizer: one of engm's outer optimizers over ``model``.
        attack: the training attack, run in the mode that it asks for, with the trainer's own noise generator.
        objective: the training loss.
        seed: seed of the attack noise; trainers with the same seed draw the same noise.
        borrow: let the attack's last step measure the norms, where the objective allows it. Otherwise the optimizer
            measures them itself. ``None`` borrows where batch norms couple the examples, or the optimizer reads input
            gradients; where nothing couples, the optimizer's own pass is exact and costs no more.
        logger: takes the figures of every step and, by :meth:`log_epoch`, of every epoch.
        log_every: steps between two writes. Figures stay on the device until then, and writing waits for it;
            ``None`` writes at the end of the epoch, which waits anyway.
        plain: a stand-in for ``model`` in the attack's steps that measure nothing: its network, compiled.
        forward: how the training loss calls the model, ``DistributedDataParallel`` around it; default the model.
        processes: the processes that share every batch, each with its own rows and the same ``seed``.
        step: how attack, loss and backward pass run: ``"eager"``, as they are; a backend of :func:`engm.record`; or
            ``"auto"``, which takes one. Steps that cannot be recorded run as they are; :meth:`step_report` says which.
        accumulate: the parts of equal size that every batch is taken in, one after another, each with an attack,
            a forward and a backward pass of its own; the update is that of their sum. Batch norms see a part at a time.
        scaler: scales the losses of a network in float16, and skips steps whose gradients overflow all the same; their
            weights are in no figure.

    Raises:
        ValueError: ``log_every`` or ``accumulate`` is not positive, or ``step`` is not known or does not run here.

    Attributes:
        attack: the training attack; may be replaced between steps (a growing ``eps``). With ``eps`` of 0 there is none.
        awp: perturbs the weights around the objective, if set. Norms are then of the perturbed weights, so none are
            borrowed from the attack.
        logger: takes the figures; may be set or replaced between epochs.
        steps: number of steps taken so far.
    """

    def __init__(
        self,
        model: engm.GradNormModule,
        optimizer: torch.optim.Optimizer,
        attack: PGD,
        *,
        objective: Objective = VANILLA,
        seed: int = 0,
        borrow: bool | None = None,
        logger: Logger | None = None,
        log_every: int | None = None,
        plain: nn.Module | None = None,
        forward: nn.Module | None = None,
        processes: Processes | None = None,
        step: str = "auto",
        accumulate: int = 1,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        for name, count in (("log_every", log_every), ("accumulate", accumulate)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.model = model
        self.optimizer = optimizer
        self.attack = attack
        self.objective = objective
        self.awp: AWP | None = None
        device = next(model.parameters()).device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.logger = logger
        self.steps = 0
        self._log_every = log_every
        self._accumulate = accumulate
        self._scaler = scaler
        self._uses_inputs = bool(getattr(optimizer, "uses_input_grads", False))
        self._captures = self._uses_inputs or bool(getattr(optimizer, "uses_norms", False))
        self._may_borrow = borrow is not False and objective.attack_maximises_it and self._captures
        self._borrows_anyway = bool(borrow) or self._uses_inputs
        self._processes = Processes(device) if processes is None else processes
        self._losses = AttackedLosses(
            model,
            optimizer,
            self.generator,
            self._processes,
            model if forward is None else forward,
            plain,
            self._captures,
            attack,
            objective,
            self._may_borrow,
            share=1 / accumulate,
        )
        self._recorder = Recorder(self._losses, step)
        self._clock = StepClock(device)
        self._figures = StepFigures()
        # Figures and times of those steps of the epoch that were fetched from the device already.
        self._epoch: list[Examples] = []
        self._seconds: list[float] = []
        self._lrs: list[float] = []  # of the steps whose figures are still on the device

    def step(self, x: Tensor, y: Tensor, rows: Tensor | None = None) -> None:
        """Attacks one batch and updates the weights on it.

        Args:
            x: natural inputs ``[n, ...]`` in [0, 1]; with several processes, this one's.
            y: labels ``[n]``.
            rows: where the examples are in the training set, ``[n]``; without them an objective that keeps something of
                every example keeps nothing of these.

        Raises:
            NonFiniteError: a loss or a gradient is not finite (found later on a GPU, when figures are looked at).
        """
        try:
            self._step(x, y, rows)
        except NonFiniteError as error:
            raise NonFiniteError(f"the training loss is not finite at step {self.steps + 1}") from error
        self.steps += 1
        if self._log_every is not None and self.steps % self._log_every == 0:
            self._look()

    def _step(self, x: Tensor, y: Tensor, rows: Tensor | None) -> None:
        with self._clock:
            losses = self._losses
            losses.objective = self.objective
            if losses.attack != self.attack:  # an equal one would be another object, and look like a change
                losses.attack = self.attack
            losses.borrows = self._may_borrow and self.awp is None and self.attack.eps > 0
            losses.borrows = losses.borrows and (self._borrows_anyway or couples(self.model))
            losses.awp = self.awp
            beside = self.objective.beside
            rows = None if beside is None else rows
            count = self._accumulate
            of_parts = [None] * count if rows is None else rows.chunk(count)
            parts = zip(x.chunk(count), y.chunk(count), of_parts, strict=True)
            divisor = len(x) if count > 1 else None
            scale = 1.0 if self._scaler is None else self._scaler.get_scale()
            stats = joined([self._part(*part, divisor, scale) for part in parts])
            self._lrs.append(self._lr)
            if self._scaler is None:
                self.optimizer.step()
            else:
                self._scaler.scale(stats.losses)  # which is when it makes its state
                self._scaler.step(self.optimizer)
                self._scaler.update()
                if self._scaler.get_scale() < scale:  # which is how it tells that it took no step
                    stats = skipped(stats)
            self.optimizer.zero_grad()
            if beside is not None:
                beside.step()
        self._figures.add(stats, getattr(self.optimizer, "grad_norm", None))

    def _part(self, x: Tensor, y: Tensor, rows: Tensor | None, divisor: int | None, scale: float) -> engm.StepStats:
        """Adds a part's share of the batch's gradient, times a scale.

        ``divisor`` is the number of examples of all parts.
        """
        stats = self._recorder.take(x, y, rows, divisor, scale)
        return self._eager(x, y, rows, divisor, scale) if stats is None else stats

    def _eager(self, x: Tensor, y: Tensor, rows: Tensor | None, divisor: int | None, scale: float) -> engm.StepStats:
        adversarial = self._losses.attacked(x, y)
        x_adv = adversarial.inputs.requires_grad_(self._uses_inputs and not self._losses.borrows)
        with self._losses.computed(x, x_adv, y, rows) as losses:
            inputs = x_adv if x_adv.requires_grad else None
            return self._backward(losses, inputs, adversarial.measurement, divisor, scale)

    def _backward(
        self,
        losses: Tensor,
        inputs: Tensor | None,
        measurement: engm.Measurement | None,
        divisor: int | None,
        scale: float,
    ) -> engm.StepStats:
        optimizer: Any = self.optimizer
        scaled = {} if scale == 1.0 else {"loss_scale": scale}  # optimizers of others may have no such options
        if self._processes.world == 1:
            of_all = {} if divisor is None else {"divisor": divisor}
            return optimizer.backward(losses, inputs=inputs, measurement=measurement, **of_all, **scaled)
        weighted = optimizer.reweight(losses, inputs, measurement=measurement, **scaled)
        (scale * (weighted.mean() if divisor is None else weighted.sum() / divisor)).backward()
        return optimizer.stats

    def finish_epoch(self) -> EpochRecord:
        """The figures of all steps since the last call; this is where the device is waited for.

        Raises:
            RuntimeError: there was no step.
            NonFiniteError: one of the latest losses was not finite.
        """
        self._look()
        steps, self._epoch = self._epoch, []
        seconds, self._seconds = self._seconds, []
        if not steps:
            raise RuntimeError("no step since the last epoch: is the training set smaller than one batch?")
        summary = together(steps).summary()
        return EpochRecord(
            loss=summary["loss"],
            mean_weight=summary["weight_mean"],
            fraction_clipped=summary["clipped"],
            mean_norm=summary.get("norm_mean"),
            lr=self._lr,
            step_seconds=seconds,
            summary=summary,
        )

    def step_report(self) -> StepReport:
        """How many steps this trainer has taken from a recorded program, and why not the others."""
        return self._recorder.report()

    def log_epoch(self, epoch: int, record: EpochRecord, looks: Figures | None = None) -> None:
        """Hands an epoch's figures to the logger, if there is one.

        Args:
            epoch: number of finished epochs.
            record: from :meth:`finish_epoch`.
            looks: ``natural`` and ``robust``, the accuracies on the validation set, and more figures by name; ``None``
                where nobody looked.
        """
        if self.logger is None:
            return
        self.logger.log(
            "epoch",
            epoch,
            {
                **record.summary,
                "lr": record.lr,
                "seconds": sum(record.step_seconds),
                **({"natural": None, "robust": None} if looks is None else looks),
            },
        )

    @property
    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _look(self) -> None:
        """Fetches the figures of the latest steps from the device, and logs them."""
        steps, seconds = self._figures.take(), self._clock.take()
        self._epoch += steps
        self._seconds += seconds
        lrs, self._lrs = self._lrs, []
        first = self.steps - len(steps) + 1
        for index, figures in enumerate(steps, start=first):
            if not bool(figures.losses.isfinite().all()):
                raise NonFiniteError(f"the training loss is not finite at step {index}")
        if self.logger is not None:
            for index, (figures, lr, time) in enumerate(zip(steps, lrs, seconds, strict=True), start=first):
                self.logger.log("step", index, {**figures.summary(), "lr": lr, "seconds": time})

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on but the weights; plain containers and tensors.

        Raises:
            NonFiniteError: one of the latest losses was not finite, so that this state is not worth keeping.
        """
        self._look()
        return {
            "optimizer": self.optimizer.state_dict(),
            "noise": self.generator.get_state(),
            "steps": self.steps,
            "figures": pack(self._epoch),
            "seconds": list(self._seconds),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["noise"])
        self.steps = state["steps"]
        self._epoch = unpack(state["figures"])
        self._seconds = list(state["seconds"])
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])
