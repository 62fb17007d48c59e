"""How adversarial examples are found by projected gradient descent, the inner problem of adversarial training (Eq. 1b).

An attack differentiates with respect to the input only: no weight gradient is computed and no ``p.grad`` is touched.
The last step of an attack may measure per-example gradient norms (``measure=True``), which the training step then
borrows instead of paying for a backward pass of its own. Eq. 1b is that of Dabouei et al., *Revisiting Outer
Optimization in Adversarial Training*, 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from math import inf
from typing import Literal

import torch
from torch import Tensor, nn

from ..capture.sharded import sharded_parts
from ..checks import check_positive
from ..measurement import Measurement, measure
from ..optim import ExampleOptimizer
from .ball import Norm, check_examples, per_example, project, unit
from .gathered import Gathered
from .losses import PerExampleLoss, cross_entropy, kl_divergence, log_probabilities, margin
from .modes import evaluation_mode, paused
from .stopping import Standing, moved_or_left

_LOSSES: dict[str, PerExampleLoss] = {"ce": cross_entropy, "margin": margin}


@dataclass(frozen=True)
class _Wanted:
    """What the last step of an attack measures.

    Attributes:
        norms: whether per-example gradient norms are measured.
        input_grads: whether gradients with respect to the input are kept.
    """

    norms: bool
    input_grads: bool

    @classmethod
    def of(cls, measure: bool | ExampleOptimizer) -> _Wanted:
        if isinstance(measure, bool):
            return cls(measure, measure)
        if not isinstance(measure, ExampleOptimizer):
            raise TypeError(f"measure must be True, False or one of engm's optimizers, got {type(measure).__name__}.")
        # What is read together with input gradients comes with them.
        borrows = measure.needs_norms if measure.needs_input_grads else measure.borrows_norms
        return cls(borrows, measure.needs_input_grads)

    @property
    def anything(self) -> bool:
        return self.norms or self.input_grads


@dataclass(frozen=True)
class Adversarial:
    """What an attack returns.

    Attributes:
        inputs: adversarial examples, shaped like the inputs, detached.
        measurement: what the last step measured at the input of that step (``inputs`` before the last update); None if
            nothing was to be measured.
    """

    inputs: Tensor
    measurement: Measurement | None = None


@dataclass(frozen=True)
class Problem:
    """What one call of an attack attacks.

    Attributes:
        model: the network, which the step that measures calls.
        plain: what every other step calls: ``model`` itself unless there is a stand-in.
        origin: natural inputs ``[n, ...]``.
        labels: ``[n]``.
        natural: log-probabilities ``[n, K]`` at ``origin``, if the loss compares with them.
    """

    model: nn.Module
    plain: nn.Module
    origin: Tensor
    labels: Tensor
    natural: Tensor | None = None

    def take(self, rows: Tensor) -> Problem:
        """The problem of the examples in ``rows`` alone."""
        natural = None if self.natural is None else self.natural[rows]
        return Problem(self.model, self.plain, self.origin[rows], self.labels[rows], natural)


@dataclass(frozen=True)
class _Forward:
    """A forward pass at one point of an attack.

    Attributes:
        leaf: the point, which requires grad.
        logits: ``[n, K]``, detached.
        losses: ``[n]`` with their graph.
    """

    leaf: Tensor
    logits: Tensor
    losses: Tensor

    @property
    def at(self) -> Tensor:
        return self.leaf.detach()


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent inside ``{x' : ||x' - x|| <= eps} ∩ [0, 1]`` (Madry et al., 2018).

    Each step moves along the sign of the input gradient (``"linf"``) or along the gradient itself scaled to length 1
    (``"l2"``), then projects onto the ball and the box. With a ``torch.Generator`` the attack is deterministic.

    Attributes:
        eps: radius of the ball, in units of the input (pixels live in [0, 1]); with 0 the attack returns ``x``.
        step_size: length of a step, in units of the input.
        steps: number of steps, at least one.
        norm: ``"linf"`` or ``"l2"`` (over all entries of an example).
        random_start: start at a uniform draw (``"l2"``: uniform direction, uniform radius) instead of at ``x``.
        loss: what is maximised: ``"ce"``, ``"margin"``, ``"kl"`` or any function ``(logits, labels) -> [n]``. ``"kl"``
            is ``KL(p(x) || p(x'))``, with the prediction at ``x`` taken once, without gradients, in the mode of the
            attack (TRADES; Zhang et al., 2019). The gradient of ``"kl"`` is zero at ``x``, so ``random_start`` is
            needed.
        eval_mode: attack the network in evaluation mode (running statistics, no dropout), as TRADES, AWP and most
            others do. ``False`` leaves every module as it is: training-mode batch norm then also updates its
            running statistics at each step. While the network still changes fast, norms that are borrowed are faithful
            to the training step's only with ``False``; a step does not use those that it judges to be too far off
            (docs/exactness.md).
        restarts: number of runs; for each example the one that ended with the highest loss is kept, with
            ``stop_when_broken`` of those that broke it, if any did.
        stop_when_broken: leave an example alone once it is misclassified. This is for evaluation, which becomes
            cheaper, and for friendly adversarial training. In evaluation mode examples that stopped drop out of the
            batch, and reading which these are synchronises a CUDA device at each step. In training mode dropping them
            would change the batch statistics: all steps are taken by the whole batch, of which only the examples still
            standing move, and nothing is read. So they are of a network that ``fully_shard`` split, whose processes
            gather parameters in every pass together. With a stand-in (``plain``), which was compiled for a shape, the
            batch stays whole as well, until all have stopped.
        patience: steps that an example still takes after it was misclassified, with ``stop_when_broken`` (tau of
            Alg. 1 in Zhang et al., 2020): each step from a misclassified point uses one up, and with none left the
            example stays at that point.
        stop_gap: with ``stop_when_broken``, what broken means: that another class is more probable than the label by
            more than this: :func:`engm.adversarial.probability_gap` (lambda of ATES; Sitawarin et al., 2020).
        start_noise: start at ``x`` plus a standard normal draw times this instead of at a uniform draw (0.001 in
            TRADES, MART and AWP). The start itself is not clamped, as in their code, unless ``stop_when_broken`` may
            return it.
        step_noise: every step adds a standard normal draw times this before it projects (omega of FAT, 0.001 in the
            code of its authors).
        loss_scale: factor on the losses inside the backward passes, which float16 needs: without it small gradients
            are flushed to zero, and pixels stay where they are. Directions do not change, and what is measured is freed
            of it again.
    """

    eps: float
    step_size: float
    steps: int
    norm: Norm = "linf"
    random_start: bool = True
    loss: Literal["ce", "margin", "kl"] | PerExampleLoss = "ce"
    eval_mode: bool = True
    restarts: int = 1
    stop_when_broken: bool = False
    patience: int = 0
    stop_gap: float | None = None
    start_noise: float | None = None
    step_noise: float = 0.0
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.eps >= 0 or not self.step_size > 0:
            raise ValueError(f"PGD needs eps >= 0 and step_size > 0, got eps={self.eps}, step_size={self.step_size}")
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(
                f"PGD needs eps <= 1 with norm='linf', because inputs lie in [0, 1], got eps={self.eps}: for "
                f"{self.eps:g} of the 255 grey levels give {self.eps:g} / 255, and step_size likewise"
            )
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"PGD needs steps >= 1 and restarts >= 1, got {self.steps} and {self.restarts}")
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"PGD knows norm='linf' and norm='l2', got {self.norm!r}")
        if isinstance(self.loss, str) and self.loss not in (*_LOSSES, "kl"):
            raise ValueError(
                f"PGD knows loss='ce', 'margin', 'kl' or a function of (logits, labels), got {self.loss!r}"
            )
        if self.restarts > 1 and not self.random_start:
            raise ValueError("restarts without random_start would repeat the same run; set random_start=True")
        if self.loss == "kl" and not self.random_start:
            raise ValueError("PGD with loss='kl' would stay at x, where the loss is smallest; set random_start=True")
        if self.start_noise is not None and not (0 < self.start_noise < inf and self.random_start):
            raise ValueError(
                "PGD needs start_noise > 0 and with it random_start=True (start_noise=None for a uniform start), got "
                f"start_noise={self.start_noise} and random_start={self.random_start}"
            )
        if not 0 <= self.step_noise < inf:
            raise ValueError(f"PGD needs a finite step_noise >= 0, got {self.step_noise}")
        check_positive("loss_scale", self.loss_scale)
        if self.patience < 0 or (self.patience > 0 and not self.stop_when_broken):
            raise ValueError(
                "PGD needs patience >= 0, and stop_when_broken=True where it is positive, got "
                f"patience={self.patience} and stop_when_broken={self.stop_when_broken}"
            )
        if self.stop_gap is not None and not (-1 <= self.stop_gap <= 1 and self.stop_when_broken):
            raise ValueError(
                "PGD needs stop_gap in [-1, 1], between two probabilities, and with it stop_when_broken=True, got "
                f"stop_gap={self.stop_gap} and stop_when_broken={self.stop_when_broken}"
            )

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        measure: bool | ExampleOptimizer = False,
        noise: Tensor | None = None,
        plain: nn.Module | None = None,
    ) -> Adversarial:
        """Attacks ``model`` at ``(x, y)``.

        Args:
            model: any module that maps ``x`` to logits ``[n, K]``; with ``measure`` a ``GradNormModule``.
            x: natural inputs ``[n, ...]``, floating point, in [0, 1].
            y: labels ``[n]``.
            generator: source of the random starts; may live on the CPU while ``x`` does not.
            measure: let the last step call ``engm.measure``, whose result comes back as ``.measurement``. With an
                optimizer in place of ``True`` what the optimizer's next ``backward`` reads is measured and no more:
                nothing (``.measurement`` is None) while borrowed norms are judged to be too far off.
                Input gradients alone (N-ENGM, A-ENGM between two regressions) cost nothing, because the attack takes
                them anyway. With ``stop_when_broken`` an example that stops is measured where it stops. In evaluation
                mode the passes over the whole batch in which many stop measure them, and the last step goes over those
                that are left; else it goes over all examples, also if every one has stopped.
            noise: what the start adds to ``x``, shaped like ``x``, from :meth:`draw`, with ``step_noise`` also what the
                steps add; nothing is drawn then, and ``generator`` is not read. This is for one process of several,
                which draws the noise of the whole batch and takes its own rows.
            plain: stand-in for ``model`` wherever nothing is captured, ``torch.compile(net)`` say, with the same
                weights. The step that measures calls ``model``.

        Returns:
            Adversarial examples, and the measurement if there is one.

        Raises:
            ValueError: empty or out-of-range inputs (the range is looked at on the CPU only, where looking is cheap),
                labels that do not match, ``measure`` or ``noise`` together with ``restarts``, noise unlike ``x``, or
                a stand-in with weights of its own.
            TypeError: ``measure`` is neither a bool nor one of engm's optimizers.
        """
        wanted = _Wanted.of(measure)
        self._check(x, y, wanted, noise)
        if plain is None:
            plain = model
        elif [id(p) for p in plain.parameters()] != [id(p) for p in model.parameters()]:
            raise ValueError("plain must have the very parameters of model, as torch.compile(net) has those of net.")
        origin = x.detach()
        with torch.enable_grad(), ExitStack() as stack:
            if self.eval_mode:
                stack.enter_context(evaluation_mode(model))
                if plain is not model:
                    stack.enter_context(evaluation_mode(plain))
            problem = Problem(model, plain, origin, y, self._natural(model, plain, origin))
            best = self._run(problem, *self._start(problem, generator, noise), wanted)
            if self.restarts == 1:
                return best
            best_loss, broken = self._outcome(problem, best.inputs)
            for _ in range(self.restarts - 1):
                other = self._run(problem, *self._start(problem, generator), wanted).inputs
                loss, breaks = self._outcome(problem, other)
                better = loss > best_loss
                if self.stop_when_broken:
                    better = torch.where(breaks == broken, better, breaks)
                best = Adversarial(torch.where(per_example(better, other), other, best.inputs))
                best_loss, broken = torch.where(better, loss, best_loss), torch.where(better, breaks, broken)
        return best

    def draw(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Tensor:
        """The noise that a run adds to ``x``, drawn from the generator as a run does.

        Args:
            shape: of the inputs, ``[n, ...]``.
            generator: source of the noise; may live on the CPU while the noise does not. Default: torch's own of
                ``device``.
            dtype: of the inputs.
            device: of the inputs.

        Returns:
            What the start adds, shaped ``shape``, in units of the input; zero without ``random_start``. With
            ``step_noise`` ``[1 + steps, *shape]``: what the start adds, and then what each step does.
        """
        source = device if generator is None else generator.device

        def normal() -> Tensor:
            return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)

        def uniform(size: Sequence[int]) -> Tensor:
            return torch.rand(tuple(size), generator=generator, device=source, dtype=dtype).to(device)

        if not self.random_start:
            start = torch.zeros(tuple(shape), dtype=dtype, device=device)
        elif self.start_noise is not None:
            start = self.start_noise * normal()
        elif self.norm == "linf":
            start = (2 * uniform(shape) - 1) * self.eps
        else:
            direction = normal()
            start = unit(direction) * per_example(uniform(shape[:1]) * self.eps, direction)
        if not self.step_noise:
            return start
        # Drawn for all examples and all steps, whichever will have stopped, so that several processes draw alike.
        return torch.stack([start, *(self.step_noise * normal() for _ in range(self.steps))])

    def _check(self, x: Tensor, y: Tensor, wanted: _Wanted, noise: Tensor | None) -> None:
        check_examples(x, y)
        if wanted.anything and self.restarts > 1:
            raise ValueError(f"measure needs one run over all examples: restarts=1, not {self.restarts}")
        if noise is None:
            return
        if self.restarts > 1:
            raise ValueError(f"noise is the start of one run, and restarts={self.restarts}; pass a generator instead")
        shape = self._shape_of_noise(x)
        if noise.shape != shape or noise.dtype != x.dtype or noise.device != x.device:
            raise ValueError(
                f"expected noise like the inputs, {x.dtype} {list(shape)} on {x.device}, got {noise.dtype} "
                f"{list(noise.shape)} on {noise.device}; draw it with attack.draw(x.shape, dtype=..., device=...)"
            )

    def _shape_of_noise(self, x: Tensor) -> tuple[int, ...]:
        return (1 + self.steps, *x.shape) if self.step_noise else tuple(x.shape)

    def _natural(self, model: nn.Module, plain: nn.Module, x: Tensor) -> Tensor | None:
        if self.loss != "kl":
            return None
        with torch.no_grad(), paused(model):
            return log_probabilities(plain(x))

    def _run(self, problem: Problem, x_adv: Tensor, drift: Tensor | None, wanted: _Wanted) -> Adversarial:
        """One run from the start ``x_adv``, with what its steps add as ``drift [steps, n, ...]``."""
        standing = Standing(problem.labels, self.patience, self.stop_gap) if self.stop_when_broken else None
        # Processes that gather the parameters of each pass together have to run as many.
        if standing is not None and self.eval_mode and not sharded_parts(problem.model):
            return self._run_until_broken(problem, x_adv, drift, standing, wanted)
        measurement = None
        for step in range(self.steps):
            measures = wanted.anything and step == self.steps - 1
            forward = self._forward(problem, x_adv, stand_in=not measures, captured=measures and wanted.norms)
            if measures:
                gradient, measurement = self._measured(problem.model, forward, norms=wanted.norms)
            else:
                gradient = self._gradient(forward)
            moved = self._ascend(problem.origin, forward.at, gradient, None if drift is None else drift[step])
            x_adv = moved if standing is None else moved_or_left(standing, forward.logits, moved, forward.at)
        return Adversarial(x_adv, measurement)

    def _run_until_broken(
        self, problem: Problem, x_adv: Tensor, drift: Tensor | None, standing: Standing, wanted: _Wanted
    ) -> Adversarial:
        """At most ``steps`` steps of every example, which stops moving as soon as ``standing`` says so.

        An example is measured where it stops. A pass measures all of its examples or none, at two fifths of its price.
        So the first passes, which are over all examples, measure where more than a third of them stop, and the last
        step goes over those that were not measured, whether they stand or not.
        """
        n, x_adv = len(x_adv), x_adv.clone()
        found = Gathered(n, x_adv.device, norms=wanted.norms)
        whole = problem.plain is not problem.model
        for step in range(self.steps):
            last = wanted.norms and step == self.steps - 1
            rows = found.rows_to_measure() if last else standing.moving.nonzero().squeeze(1)
            if not len(rows) and not wanted.norms:
                break
            if not len(rows):
                continue  # to the last step, which measures
            if whole:
                rows = torch.arange(n, device=x_adv.device)
            first = wanted.norms and not whole and len(rows) == n and step >= self.patience
            here = problem.take(rows)
            forward = self._forward(here, x_adv[rows], stand_in=not last, captured=last or first)
            standing.look(forward.logits, rows)
            moving = standing.moving[rows]
            if last or (first and 3 * int(moving.sum()) < 2 * n):
                gradient, measurement = self._measured(problem.model, forward, norms=True)
                found.passed(rows, forward.losses, gradient)
                found.measured(rows, measurement, torch.ones_like(moving) if last else ~moving)
            else:
                gradient = self._gradient(forward)
                if wanted.anything:
                    found.passed(rows, forward.losses, gradient / self.loss_scale)
            moved = self._ascend(here.origin, forward.at, gradient, None if drift is None else drift[step, rows])
            x_adv[rows] = torch.where(per_example(moving, moved), moved, forward.at)
        return Adversarial(x_adv, found.measurement(problem.model) if wanted.anything else None)

    def _forward(self, problem: Problem, x_adv: Tensor, *, stand_in: bool, captured: bool) -> _Forward:
        """Logits and losses at a point; nothing is captured for what is not measured."""
        leaf = x_adv.detach().requires_grad_()
        with nullcontext() if captured else paused(problem.model):
            logits = (problem.plain if stand_in else problem.model)(leaf)
            return _Forward(leaf, logits.detach(), self._losses(logits, problem))

    def _gradient(self, forward: _Forward) -> Tensor:
        """Gradient of the summed losses, :attr:`loss_scale` times."""
        seeds = torch.full_like(forward.losses, self.loss_scale)
        (gradient,) = torch.autograd.grad(forward.losses, forward.leaf, seeds)
        return gradient

    def _measured(self, model: nn.Module, forward: _Forward, *, norms: bool) -> tuple[Tensor, Measurement]:
        """Gradient of the summed losses, and the measurement that it is a part of."""
        found = measure(model, forward.losses, inputs=forward.leaf, norms=norms, loss_scale=self.loss_scale)
        if not isinstance(found.input_grads, Tensor):
            kind = type(found.input_grads).__name__
            raise RuntimeError(f"engm.measure must return the gradient of its one input, got {kind}")
        return found.input_grads, found

    def _losses(self, logits: Tensor, problem: Problem) -> Tensor:
        if problem.natural is not None:
            return kl_divergence(problem.natural, log_probabilities(logits))
        function = _LOSSES[self.loss] if isinstance(self.loss, str) else self.loss
        losses = function(logits, problem.labels)
        if losses.shape != problem.labels.shape:
            raise ValueError(
                f"the attack needs one loss per example, [{len(problem.labels)}], got {list(losses.shape)}; use "
                "reduction='none'"
            )
        return losses

    def _outcome(self, problem: Problem, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """The losses ``[n]`` of what a run made, and which examples are misclassified."""
        with torch.no_grad(), paused(problem.model):
            logits = problem.plain(x_adv)
            return self._losses(logits, problem), logits.argmax(1) != problem.labels

    def _start(
        self, problem: Problem, generator: torch.Generator | None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Where a run starts, and what its steps add, if they add anything: ``[steps, n, ...]``."""
        x = problem.origin
        if noise is None:
            if not self.random_start and not self.step_noise:
                return x.clone(), None
            noise = self.draw(x.shape, generator, dtype=x.dtype, device=x.device)
        start, drift = (noise[0], noise[1:]) if self.step_noise else (noise, None)
        if self.start_noise is not None and not self.stop_when_broken:
            return x + start, drift
        return project(x + start, x, self.eps, self.norm), drift

    def _ascend(self, origin: Tensor, x_adv: Tensor, gradient: Tensor, noise: Tensor | None) -> Tensor:
        direction = gradient.sign() if self.norm == "linf" else unit(gradient)
        moved = x_adv + self.step_size * direction
        return project(moved if noise is None else moved + noise, origin, self.eps, self.norm)
