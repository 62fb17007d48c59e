"""The face that every outer optimizer shows: weights from norms, gradients from weights, around any torch optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..backward.inputs import Inputs
from ..backward.norms import Measurement
from ..checks import check_positive
from ..distributed import Ranks, total
from ..loss_checks import check_losses
from ..module import as_wrapped
from ..ops import accumulation_dtype, uncast
from ..terms.loss_scale import LossScale
from ..torch_internals import norms_of_each
from .batch import LossBatch
from .closure import refuse_missing_closure, refuse_unweighted_closure
from .outside import OutsideWatch, refuse_parameters_outside
from .together import Agreement, in_processes
from .unweighted import UnweightedWatch
from .weights import ExampleNorms, StepStats, Weighting, checked_weighting


class ExampleOptimizer(torch.optim.Optimizer):
    """Base of the outer optimizers: an inner torch optimizer plus a weight ``w_i`` for every example.

    It is a :class:`torch.optim.Optimizer`: ``param_groups`` and ``state`` are the inner optimizer's, so schedulers,
    ``zero_grad`` and gradient scalers work on it as on any other.

    Args:
        model: a :class:`engm.GradNormModule` (or ``DistributedDataParallel`` around one).
        optimizer: any torch optimizer over the model's parameters.

    Raises:
        TypeError: the model is not wrapped, or ``optimizer`` is not a torch optimizer.
        ValueError: the optimizer holds trained parameters that are not the model's.

    Attributes:
        stats: :class:`StepStats` of the last call, or None.
        uses_norms: whether the weights come from parameter-gradient norms.
        uses_input_grads: whether the weights come from input gradients.
    """

    uses_norms = False
    uses_input_grads = False
    _shown: tuple[str, ...] = ()  # options that repr shows
    _hyperparameters: tuple[str, ...] = ()  # numbers that a checkpoint restores, as torch's optimizers restore lr
    _program_inputs: tuple[str, ...] = ()  # numbers in whose place the same class's weights takes tensors
    _ranks: Ranks | None = None  # of the last call
    _step_supports_amp_scaling = False  # GradScaler unscales and skips itself: it cannot reach into a fused inner step

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = as_wrapped(model)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        if isinstance(optimizer, ExampleOptimizer):
            raise TypeError(
                f"optimizer must be one of torch's, not engm's {type(optimizer).__name__}: examples have one weight "
                "each. To clip the weighted gradient as a whole, too, call torch.nn.utils.clip_grad_norm_ before step."
            )
        self.optimizer = optimizer
        refuse_parameters_outside(self.model, optimizer.param_groups)
        self.stats: StepStats | None = None
        self._watch = OutsideWatch()
        self._unweighted = UnweightedWatch()
        if isinstance(model, DistributedDataParallel):
            self._ranks = Ranks(model.process_group, data_parallel=weakref.ref(model))
        if self.uses_input_grads:
            self.model.input_grads_wanted = True

    # -- what a subclass decides -----------------------------------------------------------------------------

    def weights(self, norms: ExampleNorms) -> Weighting:
        """The weights of one batch's examples; the one method that a subclass has to define.

        Args:
            norms: what :attr:`needs_norms` and :attr:`needs_input_grads` asked for.
        """
        raise TypeError(f"{type(self).__name__} must define weights(norms) -> engm.optim.Weighting")

    def _check_numbers(self) -> None:
        """Look at options that may have been set or loaded since.

        Raises:
            ValueError: an option is out of range.
        """

    def _check_options(self) -> None:
        """Look at everything that may have been set since, before a batch's graph is touched.

        Raises:
            ValueError, RuntimeError: an option is out of range, or does not fit the model any more.
        """
        self._check_numbers()

    @property
    def needs_norms(self) -> bool:
        """Whether the next ``backward`` reads parameter-gradient norms; if not, ``measure(norms=False)`` will do."""
        return self.uses_norms

    @property
    def needs_input_grads(self) -> bool:
        """Whether the next ``backward`` reads input gradients."""
        return self.uses_input_grads

    @property
    def borrows_norms(self) -> bool:
        """Whether the next ``backward`` has a use for the norms of a measurement: it takes them, or judges them anew.

        Without it passes of its own follow, see :attr:`StepStats.source`.
        """
        return self.needs_norms and self.model.calibration.would_borrow()

    @property
    def estimates_from_all(self) -> bool:
        """Whether the next ``backward`` estimates from the batch of all ranks, see :attr:`ExampleNorms.group`."""
        return False

    # -- the face --------------------------------------------------------------------------------------------

    def backward(
        self,
        losses: Tensor,
        inputs: Inputs = None,
        *,
        measurement: Measurement | None = None,
        divisor: float | None = None,
        loss_scale: float = 1.0,
        check: bool | None = None,
    ) -> StepStats:
        """Add ``loss_scale / divisor * sum_i w_i dL_i/dtheta`` to ``p.grad`` of the model's trained parameters.

        Under ``DistributedDataParallel`` gradients are averaged over the ranks as in its own backward pass, while they
        are still being summed; under ``no_sync`` they wait, accumulated, for the next pass outside of it.

        Args:
            losses: ``[n]``, one loss an example, undivided, from a forward pass of the model. Its graph is freed.
            inputs: the tensor (or tuple) whose gradient N- and A-ENGM read; it must require grad or be the very
                tensor the wrapped model was called with. The others ignore it.
            measurement: of the same examples, in any statistics mode, as :func:`engm.measure` returned it; no norm
                pass is run then, unless it is judged to be too far off (``stats.source``, :class:`StepStats`).
            divisor: ``n`` unless given; micro-batches give the whole batch's ``n``, on this rank.
            loss_scale: factor on the gradient (and inside the norm pass, where it is divided out again).
            check: look for non-finite losses; default on the CPU only.

        Returns:
            The step's :class:`StepStats`, also kept as ``stats``.

        Raises:
            TypeError, ValueError, RuntimeError: bad arguments, as :func:`engm.measure`, or a network split by
                ``fully_shard``; parameters, gradients and optimizer state are as they were. Of several ranks that work
                together all raise the error of the first (on the CPU, or with ``check=True`` on all of them).
        """
        if self.model.shard_group is not None:
            raise RuntimeError(
                "under fully_shard gradients are reduced in a backward pass of its own, to the shards: use "
                "opt.reweight(losses).mean().backward() there."
            )
        with torch.enable_grad(), self._whole():  # the caller may be in no_grad, where a backward pass may run as well
            batch, weighting = self._weighted(losses, inputs, measurement, divisor, loss_scale, check, one_pass=True)
            with uncast(losses.device):
                batch.accumulate(weighting, losses.shape[0] if divisor is None else float(divisor))
        return self._record(batch, weighting)

    def reweight(
        self,
        losses: Tensor,
        inputs: Inputs = None,
        *,
        measurement: Measurement | None = None,
        loss_scale: float = 1.0,
        check: bool | None = None,
    ) -> Tensor:
        """``w_i L_i`` with the weights detached and the graph kept, for loops that call ``.backward()`` themselves.

        The way for ``fully_shard``, ``GradScaler`` and anything else that owns the backward pass:
        ``opt.reweight(losses).mean().backward()``.

        Args:
            losses: as in :meth:`backward`.
            inputs: as in :meth:`backward`.
            measurement: as in :meth:`backward`.
            loss_scale: factor on the losses inside the norm pass, divided out again; the result is not scaled.
            check: as in :meth:`backward`.

        Returns:
            ``[n]``, differentiable.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`backward`.
        """
        with torch.enable_grad(), self._whole():
            batch, weighting = self._weighted(losses, inputs, measurement, None, loss_scale, check, one_pass=False)
            batch.release()
        self._record(batch, weighting)
        return losses * weighting.weights.to(losses.dtype)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What fails inside leaves the optimizer's own attributes as they were."""
        attributes, tensors = dict(vars(self)), self.carried()
        try:
            yield
        except BaseException:
            vars(self).clear()
            vars(self).update(attributes)
            self.carry(tensors)
            raise

    def _weighted(
        self,
        losses: Tensor,
        inputs: Inputs,
        measurement: Measurement | None,
        divisor: float | None,
        loss_scale: float,
        check: bool | None,
        *,
        one_pass: bool,
    ) -> tuple[LossBatch, Weighting]:
        """The batch, checked and measured, and its weights.

        Of several ranks that work together all get theirs, or all raise the same error.
        """
        if "optimizer" not in self.__dict__:
            raise TypeError(
                f"this {type(self).__name__} only stands for an engm optimizer, as Lightning's wrapper does, and what "
                "a step notes would be lost on it: call backward and reweight of the optimizer itself, opt.optimizer."
            )

        def checked() -> LossBatch:
            self._check_options()
            if divisor is not None:
                check_positive("divisor", divisor)
            scale = LossScale(check_positive("loss_scale", loss_scale))
            captured = self.uses_norms or self.uses_input_grads
            use_up = one_pass and self.needs_norms and not self.needs_input_grads
            batch = LossBatch(
                self.model, losses, inputs, measurement, scale=scale, check=check, captured=captured, use_up=use_up
            )
            self._watch.look(batch.trace, self.model, self.param_groups, one_pass=one_pass)
            batch.check_request(of_gradients=self.needs_norms, of_inputs=self.needs_input_grads)
            with uncast(batch.losses.device):  # the caller's autocast may still be on, as in Lightning
                batch.measure(of_gradients=self.needs_norms, of_inputs=self.needs_input_grads, one_pass=one_pass)
            return batch

        def weighed() -> Weighting:
            with uncast(batch.losses.device):
                return checked_weighting(self.weights(batch.norms()), batch.losses.shape[0], type(self).__name__)

        if not in_processes():
            batch = checked()
            return batch, weighed()
        agreement = Agreement(
            self.model,
            losses,
            latest=None if self._ranks is None else self._ranks.now(),
            check=check,
            estimates=self._estimates_as_others(),
        )
        if agreement.passes_are_shared:  # a rank that is not there would be missed by the first pass of the checks
            agreement.reached(lambda: check_losses(losses, finite=check))
        batch = agreement.reached(checked)
        return batch, agreement.reached(weighed, batch.trace)

    def _estimates_as_others(self) -> bool:
        """Whether the other ranks estimate at this step; options of this one that are out of range do not tell."""
        try:
            self._check_numbers()
        except ValueError:
            return True
        return self.estimates_from_all

    def _record(self, batch: LossBatch, weighting: Weighting) -> StepStats:
        if batch.ranks is None or batch.ranks.reduces:
            self.model.calibration.advance()
        self.stats = StepStats(
            batch.losses.detach(), weighting.weights, weighting.norms, weighting.input_norms, batch.source
        )
        self._ranks = batch.ranks
        return self.stats

    def gradient_noise_scale(self) -> Tensor:
        """The simple noise scale ``tr(Sigma) / ||G||^2`` of the weighted gradients of the last step's batch.

        In examples, 0-dimensional: the batch size about where larger batches stop paying (McCandlish et al. 2018,
        Eq. 2.9 and appendix A.1). Unbiased estimates of both terms come from the norms at hand and from ``p.grad``,
        which has to hold that one batch's mean alone: ask between ``backward`` and ``step``, without accumulation.
        Where ``||G||^2`` comes out negative, so does the scale: the batch is too small to tell. Where gradients are
        averaged over ranks the batch is that of all ranks, and all of them have to ask (two numbers are sent).

        Raises:
            RuntimeError: the last call was not a ``backward`` (or ``reweight``, with a backward pass of its mean) with
                norms of at least two examples, there are no gradients, or they were not reduced (``no_sync``).
        """
        stats = self.stats
        own = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        if any(p.requires_grad and id(p) not in own for p in self.model.parameters()):
            raise RuntimeError(
                "gradient_noise_scale is of the gradient and the norms over all trained parameters, and zero_grad of "
                "this optimizer clears those alone that it holds: give it the others too, or freeze them."
            )
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        ranks = self._ranks
        alone = ranks is None and stats is not None and stats.losses.shape[0] < 2
        if stats is None or not self.uses_norms or stats.norms is None or alone or not gradients:
            raise RuntimeError(
                "gradient_noise_scale needs the norms and the gradient of one batch of two examples or more: call it "
                "between opt.backward(losses) and opt.step(), with an optimizer that reads norms."
            )
        if ranks is not None and not ranks.reduces:
            raise RuntimeError(
                "gradient_noise_scale under no_sync would compare this rank's gradient with the norms of all ranks: "
                "ask after a step whose gradients are reduced."
            )
        n = stats.losses.shape[0]
        each = (stats.weights * stats.norms).square().reshape(-1, n).sum(0).mean()
        group, size = (None, 1) if ranks is None else (ranks.group, ranks.group.size())
        # The mean's coefficients are 1 / (ranks * n) of each rank: |mean|^2 holds the sum of their squares times the
        # trace, which is 1 / examples where n is the same on all.
        each, share = total(group, each.double() / size, torch.full_like(each, 1 / (size**2 * n)).double())
        mean = total_norm(gradients).square()
        return ((each - mean) / (mean - share * each)).to(stats.norms.dtype)

    # -- for steps that a program does -----------------------------------------------------------------------

    # Of steps; the last is a scheduler's.
    not_for_programs: tuple[str, ...] = ("stats", "_ranks", "_unweighted", "_opt_called")

    def carried(self) -> dict[str, Tensor]:
        """The tensors that a step reads and may put others in the place of, by name: what goes from step to step."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def carry(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in the place of those of :meth:`carried`."""
        vars(self).update(tensors)

    def numbers(self) -> dict[str, float]:
        """The options, by name, that a program takes as inputs, so that it holds for other values of them.

        Raises:
            ValueError: an option is out of range.
        """
        self._check_options()
        kind = next(kind for kind in type(self).__mro__ if "weights" in vars(kind))  # a user's own may read numbers
        return {name: float(getattr(self, name)) for name in vars(kind).get("_program_inputs", ())}

    def eager_reason(self) -> str | None:
        """Why the next step should not be done by a program, in words; None where it may be."""
        return None

    def after_program(self, stats: StepStats) -> StepStats:
        """One step more, of which a program has done all but the counting."""
        self.model.calibration.advance()
        self.stats = stats
        return stats

    # -- the inner optimizer's -------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's parameter groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    def __getstate__(self) -> dict[str, Any]:  # Optimizer's own keeps three attributes, all of them the inner one's
        # "step" is a scheduler's wrapper, and a process group cannot leave its process.
        return {key: value for key, value in self.__dict__.items() if key not in ("step", "_ranks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __getattr__(self, name: str) -> Any:
        optimizer = self.__dict__.get("optimizer")
        if optimizer is None:
            raise AttributeError(name)
        return getattr(optimizer, name)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The inner optimizer's step. Gradients in which no example was weighted are warned of, once.

        Args:
            closure: for inner optimizers that evaluate the loss themselves, once or several times a step, as
                :class:`torch.optim.LBFGS`: it clears the gradients, computes the losses, calls ``backward(losses)`` of
                this optimizer and returns the loss, ``losses.mean()``. Every evaluation is clipped.

        Raises:
            TypeError: the inner optimizer needs a closure and there is none.
            RuntimeError: the closure calls neither ``backward`` nor ``reweight``, so it would go round the weights.
        """
        if closure is not None:
            return self.optimizer.step(partial(self._evaluated, closure))
        refuse_missing_closure(self.optimizer)
        if self.uses_norms or self.uses_input_grads:
            self._unweighted.look(self.stats, self.param_groups)
        return self.optimizer.step()

    def _evaluated(self, closure: Callable[[], Any]) -> Any:
        """What the closure returns; it has to have weighted the examples."""
        before = self.stats
        loss = closure()
        if self.stats is before:
            refuse_unweighted_closure()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The inner optimizer's ``zero_grad``."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The inner optimizer's ``add_param_group``.

        Raises:
            ValueError: the group has trained parameters that are not the model's; it is not added.
        """
        known = len(self.param_groups)
        self.optimizer.add_param_group(param_group)
        try:
            refuse_parameters_outside(self.model, self.param_groups[known:], known)
        except ValueError:
            del self.param_groups[known:]
            raise

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and under ``"engm"`` ours: coefficients, calibration factors, counters."""
        return {**self.optimizer.state_dict(), "engm": {"method": type(self).__name__, **self._own_state()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: the state is of another optimizer, or an option in it is out of range; nothing is changed.
        """
        own = state_dict.get("engm")
        if own is None or own.get("method") != type(self).__name__:
            found = "a plain torch optimizer" if own is None else str(own.get("method"))
            raise ValueError(
                f"this state_dict is of {found}, not of {type(self).__name__}; to load only the inner optimizer's part "
                "use opt.optimizer.load_state_dict."
            )
        before = self._own_state()
        try:
            self._load_own_state(own)
            self._check_numbers()
            self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "engm"})
        except Exception:
            self._load_own_state(before)
            raise

    def _own_state(self) -> dict[str, Any]:
        hyperparameters = {key: plain_number(getattr(self, key)) for key in self._hyperparameters}
        return {"calibration": self.model.calibration.state_dict(), "hyperparameters": hyperparameters}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        hyperparameters = {key: state["hyperparameters"][key] for key in self._hyperparameters}
        self.model.calibration.load_state_dict(state["calibration"])
        for key, value in hyperparameters.items():
            setattr(self, key, value)

    def __repr__(self) -> str:
        options = "".join(f"{name}={getattr(self, name)!r}, " for name in self._shown)
        return f"{type(self).__name__}({options}{self.optimizer!r})"


def plain_number(value: Any) -> Any:
    """A number, or several, as Python has them: a checkpoint with NumPy's is refused by ``torch.load``."""
    if isinstance(value, str | bool):
        return value
    if isinstance(value, Sequence):
        return [plain_number(part) for part in value]
    return int(value) if isinstance(value, Integral) else float(value)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """``sqrt(sum ||t||^2)``, 0-dimensional, in float32 or better, without synchronisation."""
    norms = norms_of_each([t.to(accumulation_dtype(t)) for t in tensors])
    norm = torch.stack([norm.to(norms[0].device) for norm in norms]).norm()
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shards, see engm.capture.sharded
