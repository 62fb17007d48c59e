"""How a trainer's steps run, as they are or from a recorded program, and what became of them."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import engm
from engm.recording.step import BACKENDS, COMPARED, RecordedStep

from .attacked import AttackedLosses

EAGER = "eager"
CHANGING = "the attack is another one than at the step before (its eps, step size or patience changes)"


@dataclass
class StepReport:
    """What became of a trainer's steps.

    Attributes:
        replayed: steps that a program did.
        recorded: steps at which a program was made.
        eager: the other steps, which ran as they are, by the reason.
    """

    replayed: int = 0
    recorded: int = 0
    eager: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        why = ", ".join(f"{reason}: {count}" for reason, count in self.eager.most_common())
        eager = f"{self.eager.total()} eager" + (f" ({why})" if why else "")
        return f"steps: {self.replayed} replayed, {self.recorded} recorded, {eager}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {"replayed": self.replayed, "recorded": self.recorded, "eager": dict(self.eager.most_common())}


def backend_of(step: str, device: torch.device) -> str | None:
    """The backend of :func:`engm.record` that a way of taking steps means on a device; None for no recording.

    Args:
        step: ``"eager"``, a backend's name, or ``"auto"``: a CUDA graph on a GPU, where there is that backend, and a
            plain replay everywhere else. Both do the same operators on the same numbers as the step without recording.
        device: where the steps run.
    """
    if step == EAGER:
        return None
    if step == "auto":
        return "cudagraph" if device.type == "cuda" and "cudagraph" in BACKENDS else "replay"
    return step


class Recorder:
    """Takes those steps of a trainer that can be recorded.

    Args:
        losses: attack and objective; their attributes may be set between steps.
        step: as for :func:`backend_of`.

    Raises:
        ValueError: the backend is not known, or does not run here.
    """

    def __init__(self, losses: AttackedLosses, step: str) -> None:
        self._losses = losses
        self._asked_for = step not in (EAGER, "auto")
        self._step: RecordedStep | None = None
        self._eager: Counter[str] = Counter()
        self._said: set[str] = set()
        self._attack = losses.attack
        backend = backend_of(step, losses.generator.device)
        self._name = f"step={step!r}"
        self._reason = "nothing is to be recorded" if backend is None else self._reason_for_good(losses)
        if backend is not None and isinstance(losses.optimizer, engm.ExampleOptimizer):
            self._step = engm.record(losses.optimizer, losses, backend=backend)

    @staticmethod
    def _reason_for_good(losses: AttackedLosses) -> str | None:
        """Why no step of this trainer is recorded, in words; None where steps may be."""
        if not isinstance(losses.optimizer, engm.ExampleOptimizer):
            return "the optimizer is none of engm's"
        if losses.processes.world > 1:
            return "several processes share a batch"
        if losses.plain is not None:
            return "the attack's steps are compiled"
        return None

    def _reason_now(self) -> str | None:
        """Why the next step is not recorded, in words; None where it may be."""
        losses, attack = self._losses, self._losses.attack
        if attack.eps > 0 and attack.stop_when_broken and attack.eval_mode:
            return "examples that stopped drop out of the attack's batch"
        if getattr(losses.optimizer, "uses_input_grads", False) and not losses.borrows:
            return "the optimizer reads input gradients, and no attack measures them for it"
        return None

    def take(
        self, x: Tensor, y: Tensor, rows: Tensor | None = None, divisor: int | None = None, scale: float = 1.0
    ) -> engm.StepStats | None:
        """The figures of a step whose gradients are in place; None where the trainer has to take the step itself.

        Args:
            x: natural inputs ``[n, ...]``.
            y: labels ``[n]``.
            rows: where the examples are in the training set, ``[n]``, if the objective asks.
            divisor: number of examples of a batch of which these are a part; ``None`` for a whole batch.
            scale: factor on the gradients, of float16.
        """
        reason = self._reason or self._reason_now()
        if reason is not None:
            self._say(reason)
        elif self._losses.attack != self._attack:
            reason = CHANGING
        self._attack = self._losses.attack
        if reason is not None or self._step is None:
            self._eager[reason or ""] += 1
            return None
        stats = self._step(x, y, *(() if rows is None else (rows,)), divisor=divisor, loss_scale=scale)
        for refusal in self._step.report().refused:
            self._say(refusal)
        return stats

    def _say(self, reason: str) -> None:
        """Warns once that steps which were to be recorded are not; where recording is automatic the report says it."""
        if self._asked_for and reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"{self._name}, but steps run without being recorded: {reason}", stacklevel=6)

    def report(self) -> StepReport:
        """What became of the steps so far."""
        if self._step is None:
            return StepReport(eager=Counter(self._eager))
        found = self._step.report()
        eager = self._eager + found.eager
        eager[COMPARED] -= found.recorded
        return StepReport(found.replayed, found.recorded, +eager)
