"""Projected gradient descent on the input: the inner problem of adversarial training (Eq. 1b of the paper).

An attack differentiates with respect to the input only: no weight gradient is computed and no ``p.grad`` is touched.
Its last step may measure per-example gradient norms (``measure=True``), which the training step then borrows instead
of paying for a backward pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engm

if TYPE_CHECKING:
    from engm import ExampleOptimizer, Measurement

PerExampleLoss = Callable[[Tensor, Tensor], Tensor]
"""``(logits [n, K], labels [n]) -> losses [n]``; the attack maximises each of them."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every example, in nats: logits ``[n, K]``, labels ``[n]`` to ``[n]``."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``max_{k != y} z_k - z_y`` of every example: logits ``[n, K]``, labels ``[n]`` to ``[n]``.

    Positive exactly where the example is misclassified. Unlike cross-entropy its gradient does not vanish when the
    network is confident, which makes it the better loss to evaluate robustness with (Uesato et al., 2019).
    """
    own = labels.unsqueeze(1)
    others = logits.scatter(1, own, float("-inf")).amax(dim=1)
    return others - logits.gather(1, own).squeeze(1)


_LOSSES: dict[str, PerExampleLoss] = {"ce": cross_entropy, "margin": margin}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module of ``model`` in evaluation mode and gives each its own mode back, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Captures nothing in here: pauses every ``GradNormModule`` at or below ``model``; plain modules pass through."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, engm.GradNormModule):
                stack.enter_context(module.paused())
        yield


@dataclass(frozen=True)
class _Wanted:
    """What the last step measures."""

    norms: bool
    input_grads: bool

    @classmethod
    def of(cls, measure: bool | ExampleOptimizer) -> _Wanted:
        if isinstance(measure, bool):
            return cls(measure, measure)
        if not isinstance(measure, engm.ExampleOptimizer):
            raise TypeError(f"measure must be True, False or one of engm's optimizers, got {type(measure).__name__}.")
        return cls(measure.needs_norms, measure.needs_input_grads)

    @property
    def anything(self) -> bool:
        return self.norms or self.input_grads


@dataclass(frozen=True)
class Adversarial:
    """What an attack returns.

    Attributes:
        inputs: adversarial examples, shaped like the inputs, detached.
        measurement: what the last step measured at *its* input (``inputs`` before the last update), or ``None``.
    """

    inputs: Tensor
    measurement: Measurement | None = None


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent inside ``{x' : ||x' - x|| <= eps} ∩ [0, 1]`` (Madry et al., 2018).

    Each step moves along the sign of the input gradient (``"linf"``) or along the gradient itself scaled to length 1
    (``"l2"``), then projects onto the ball and the box. Deterministic under a ``torch.Generator``.

    Attributes:
        eps: radius of the ball, in units of the input (pixels live in [0, 1]).
        step_size: length of a step, same units.
        steps: number of steps, at least one.
        norm: ``"linf"`` or ``"l2"`` (over all entries of an example).
        random_start: start at a uniform draw (``"l2"``: uniform direction, uniform radius) instead of at ``x``.
        loss: ``"ce"``, ``"margin"`` or any function ``(logits, labels) -> [n]``; maximised.
        eval_mode: attack the network in evaluation mode (running statistics, no dropout), as TRADES, AWP and most
            others do. ``False`` leaves every module as it is: training-mode batch norm then also updates its
            running statistics at each step, and the step that measures treats batch statistics as constants
            (``engm.measure``), which changes its direction a little.
            Norms borrowed while the network still changes fast are faithful in this mode only (see the README).
        restarts: number of runs; for each example the one that ended with the highest loss is kept.
        stop_when_broken: leave an example alone once it is misclassified. Cheaper, and meant for evaluation; reading
            which examples are broken synchronises a CUDA device at each step.
    """

    eps: float
    step_size: float
    steps: int
    norm: Literal["linf", "l2"] = "linf"
    random_start: bool = True
    loss: Literal["ce", "margin"] | PerExampleLoss = "ce"
    eval_mode: bool = True
    restarts: int = 1
    stop_when_broken: bool = False

    def __post_init__(self) -> None:
        if not self.eps >= 0 or not self.step_size > 0:
            raise ValueError(f"PGD needs eps >= 0 and step_size > 0, got eps={self.eps}, step_size={self.step_size}")
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"PGD needs steps >= 1 and restarts >= 1, got {self.steps} and {self.restarts}")
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"PGD knows norm='linf' and norm='l2', got {self.norm!r}")
        if isinstance(self.loss, str) and self.loss not in _LOSSES:
            raise ValueError(f"PGD knows loss='ce', loss='margin' or a function of (logits, labels), got {self.loss!r}")
        if self.restarts > 1 and not self.random_start:
            raise ValueError("restarts without random_start would repeat the same run; set random_start=True")

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        measure: bool | ExampleOptimizer = False,
    ) -> Adversarial:
        """Attacks ``model`` at ``(x, y)``.

        Args:
            model: any module that maps ``x`` to logits ``[n, K]``. With ``measure`` a ``GradNormModule``.
            x: natural inputs ``[n, ...]``, floating point, in [0, 1].
            y: labels ``[n]``.
            generator: source of the random starts; may live on the CPU while ``x`` does not.
            measure: let the last step call ``engm.measure``, whose result comes back as ``.measurement``. An optimizer
                in place of ``True``: measure what its next ``backward`` reads and no more. Input gradients alone
                (N-ENGM, A-ENGM between two regressions) cost nothing: the attack takes them anyway.

        Raises:
            ValueError: empty or out-of-range inputs (the range is looked at on the CPU only, where looking is cheap),
                labels that do not match, or ``measure`` together with ``restarts`` or ``stop_when_broken``.
        """
        wanted = _Wanted.of(measure)
        self._check(x, y, wanted)
        origin = x.detach()
        with torch.enable_grad(), ExitStack() as stack:
            if self.eval_mode:
                stack.enter_context(evaluation_mode(model))
            best = self._run(model, origin, y, generator, wanted)
            if self.restarts == 1:
                return best
            best_loss = self._final_losses(model, best.inputs, y)
            for _ in range(self.restarts - 1):
                other = self._run(model, origin, y, generator, wanted).inputs
                loss = self._final_losses(model, other, y)
                better = loss > best_loss
                best = Adversarial(torch.where(_per_example(better, other), other, best.inputs))
                best_loss = torch.where(better, loss, best_loss)
        return best

    def _check(self, x: Tensor, y: Tensor, wanted: _Wanted) -> None:
        if x.dim() < 2 or x.shape[0] == 0 or not x.is_floating_point():
            raise ValueError(f"expected floating-point inputs [n, ...] with n >= 1, got {x.dtype} {list(x.shape)}")
        if y.shape != x.shape[:1]:
            raise ValueError(f"expected one label per example, [{x.shape[0]}], got {list(y.shape)}")
        if x.device.type == "cpu":
            low, high = (value.item() for value in torch.aminmax(x))
            if low < 0 or high > 1:
                raise ValueError(
                    f"expected inputs in [0, 1], got values in [{low:.4g}, {high:.4g}]; "
                    "put the normalisation inside the network, so that eps is in pixel units"
                )
        if wanted.anything and (self.restarts > 1 or self.stop_when_broken):
            raise ValueError("measure needs one run over all examples: restarts=1 and stop_when_broken=False")

    def _run(
        self, model: nn.Module, origin: Tensor, y: Tensor, generator: torch.Generator | None, wanted: _Wanted
    ) -> Adversarial:
        """One run from one start."""
        x_adv = self._start(origin, generator)
        if self.stop_when_broken:
            return Adversarial(self._run_until_broken(model, origin, x_adv, y))
        for _ in range(self.steps - 1):
            with paused(model):
                x_adv, _ = self._step(model, origin, x_adv, y)
        if not wanted.anything:
            with paused(model):
                return Adversarial(self._step(model, origin, x_adv, y)[0])
        x_adv = x_adv.detach().requires_grad_()
        with nullcontext() if wanted.norms else paused(model):
            losses = self._losses(model(x_adv), y)
        measurement = engm.measure(model, losses, inputs=x_adv, norms=wanted.norms)
        gradient = measurement.input_grads
        if not isinstance(gradient, Tensor):
            raise RuntimeError(f"engm.measure must return the gradient of its one input, got {type(gradient).__name__}")
        return Adversarial(self._ascend(origin, x_adv.detach(), gradient), measurement)

    def _run_until_broken(self, model: nn.Module, origin: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """Like ``_run``; examples drop out of the batch as soon as the network errs on them."""
        x_adv = x_adv.clone()
        rows = torch.arange(len(y), device=y.device)
        with paused(model):
            for _ in range(self.steps):
                moved, logits = self._step(model, origin[rows], x_adv[rows], y[rows])
                standing = logits.argmax(dim=1) == y[rows]
                rows = rows[standing]
                if not len(rows):
                    break
                x_adv[rows] = moved[standing]
        return x_adv

    def _step(self, model: nn.Module, origin: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One update; the new point and the (detached) logits at the old one."""
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv)
        (gradient,) = torch.autograd.grad(self._losses(logits, y).sum(), x_adv)
        return self._ascend(origin, x_adv.detach(), gradient), logits.detach()

    def _losses(self, logits: Tensor, y: Tensor) -> Tensor:
        function = _LOSSES[self.loss] if isinstance(self.loss, str) else self.loss
        losses = function(logits, y)
        if losses.shape != y.shape:
            raise ValueError(
                f"the attack needs one loss per example, [{len(y)}], got {list(losses.shape)}; use reduction='none'"
            )
        return losses

    def _final_losses(self, model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad(), paused(model):
            return self._losses(model(x_adv), y)

    def _start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.random_start:
            return x.clone()
        device = x.device if generator is None else generator.device
        if self.norm == "linf":
            noise = torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
            return self._project(x, x + (2 * noise - 1) * self.eps)
        direction = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
        radius = torch.rand(len(x), generator=generator, device=device, dtype=x.dtype).to(x.device)
        return self._project(x, x + _unit(direction) * _per_example(radius * self.eps, x))

    def _ascend(self, origin: Tensor, x_adv: Tensor, gradient: Tensor) -> Tensor:
        direction = gradient.sign() if self.norm == "linf" else _unit(gradient)
        return self._project(origin, x_adv + self.step_size * direction)

    def _project(self, origin: Tensor, x_adv: Tensor) -> Tensor:
        """Onto the ball, then onto the box; the box cannot lead out of the ball, because ``origin`` lies in it."""
        if self.norm == "linf":
            x_adv = torch.clamp(x_adv, origin - self.eps, origin + self.eps)
        else:
            delta = x_adv - origin
            length = _lengths(delta)
            x_adv = origin + delta * _per_example((self.eps / length).clamp(max=1.0), delta)
        return x_adv.clamp(0.0, 1.0)


def _per_example(values: Tensor, like: Tensor) -> Tensor:
    """``[n]`` to ``[n, 1, ...]``, to broadcast against ``like``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _lengths(x: Tensor) -> Tensor:
    """Euclidean length of every example ``[n]``; never zero, so that it may be divided by."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).clamp_min(torch.finfo(x.dtype).tiny)


def _unit(x: Tensor) -> Tensor:
    """Every example scaled to length 1; a zero example stays zero."""
    return x / _per_example(_lengths(x), x)
