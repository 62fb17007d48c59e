"""A training step that is recorded the second time that it is asked for, and replayed from then on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import isgenerator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule

from .._C import add_gradients
from ..batch_norm.calibration import DueError
from ..batch_norm.factors import FactorKey
from ..graph.plan import PlannedGraph
from ..loss_checks import check_finite
from ..measurement import Measurement
from ..optim import ExampleOptimizer, StepStats
from ..optim.together import in_processes
from ..repeatable import repeatable_kernels
from ..torch_internals import (
    constant,
    has_gradient_hooks,
    modes_on,
    recomputed_once,
    saved_tensors_of,
    take_constants,
    take_decisions,
    take_surprises,
    tree_flatten,
    tree_unflatten,
    unrecorded,
)
from .agreement import all_the_same, same_bits
from .cuda_graph import CudaGraphs
from .fused import Inductor
from .guards import MOST_STATES, OfNetwork, Reach, of_leaf, of_torch
from .places import PLAIN, Place, at
from .program import (
    Backend,
    Program,
    Replay,
    Runnable,
    cleaned,
    hang_on_data,
    hang_on_what_was_there,
    recorded,
    unknown_tensor,
    watch_any,
)
from .refusals import UnrecordableError, in_words
from .state import Before, BeforeReplay

BACKENDS: dict[str, Callable[[], Backend]] = {"replay": Replay, "inductor": Inductor, "cudagraph": CudaGraphs}
MOST_PROGRAMS = 8  # kept at once
MOST_GENERATORS = 4  # that steps draw from, besides torch's own
OUT_OF_USE = 100  # steps after which a program makes room for another
MOST_GIVEN_UP = 8  # programs of a kind in a row that did not last: what they hold for changes too often
LASTING = 100  # steps that a program is to do before it is given up
COMPARED = "recorded, and compared with its replay"  # why the step at which a program is made runs as it is
# Why a program that was made, or was to be, is not used at a step.
NO_LONGER_HOLDS = (
    "gradients came where there were none before, indices became others, or a function of yours mixed the examples"
)
OF_THE_STEP = (
    "that was not there before the step, or is kept where nobody looks: what is made of the batch by nn.Parameter, "
    "as_subclass or in another thread cannot be followed"
)
LossFunction = Callable[..., Any]


@dataclass
class Report:
    """What became of the steps so far.

    Attributes:
        recorded: programs that were made; the steps at which they were are among the eager ones.
        replayed: steps that a program did.
        eager: steps that ran as without recording, by the reason.
        refused: why steps of some kind are never recorded, one sentence each.
        length: operators of the program that was replayed last.
    """

    recorded: int = 0
    replayed: int = 0
    eager: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    length: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.recorded} recorded, {self.replayed} replayed ({self.length} operators), {self.eager.total()} eager"
        ]
        lines += [f"  eager {count} time{'s' * (count > 1)}: {reason}" for reason, count in self.eager.most_common()]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Recording:
    """A program with the meaning of its inputs and outputs.

    Attributes:
        program: what runs the operators.
        reached: the parameters that get gradients, which are the first outputs.
        figures: the names of the figures of the step that are tensors, the next outputs.
        other_figures: the step's other figures by name.
        carried: the names of the optimizer's tensors that are replaced, the next outputs.
        left: leaves of autograd's graph that are no parameters of the network and are left with gradients, the last
            outputs; and whether they had some before.
        cleared: such leaves whose gradients the step takes away.
        factors: of the calibration, those that the step asked for.
        watches: whether a last output tells that the program does not hold: that gradients came where there were none
            before, or that indices which are no constants of the code are not what they were.
        watched: the skeletons of the graphs that would be compared with autograd's gradients from time to time.
        held: tensors besides those of the network that the program reads, and where the step's code finds them; also
            the containers that they are in.
        written: memory that the program writes into.
        draws: the generators that it draws from; None: torch's own.
        given: buffers whose numbers Python was given, by name, with these numbers.
    """

    program: Runnable
    reached: list[Tensor]
    figures: tuple[str, ...]
    other_figures: Mapping[str, Any]
    carried: tuple[str, ...]
    factors: Mapping[FactorKey, tuple[str, ...]]
    watches: bool
    watched: list[Hashable] = field(default_factory=list)
    held: list[tuple[Place, Any]] = field(default_factory=list)
    written: list[Tensor] = field(default_factory=list)
    draws: list[torch.Generator | None] = field(default_factory=list)
    given: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    left: list[tuple[Tensor, bool]] = field(default_factory=list)
    cleared: list[Tensor] = field(default_factory=list)

    def before(self, opt: ExampleOptimizer) -> BeforeReplay:
        """What the program may change by itself, as it is now."""
        return BeforeReplay(self.written, self.draws, next(opt.model.parameters()).device)

    def why_not(self) -> str | None:
        """Why the program does not hold for the tensors that are there now; None where it may."""
        if not (self.program.holds() and all(at(place) is tensor for place, tensor in self.held)):
            return "tensors that the step reads were replaced by others: write into the old"
        if any(not had and leaf.grad is not None for leaf, had in self.left):
            return "the step leaves gradients elsewhere than in the network, where there are some now"
        changed = [name for name, (buffer, numbers) in self.given.items() if not same_bits(buffer, numbers)]
        return f"Python is given numbers of {changed[0]}, and they became others" if changed else None


class RecordedStep:
    """What :func:`record` returns; call it with a batch.

    Args:
        opt: the optimizer.
        loss_fn: computes losses, see :func:`record`.
        backend: how programs run.

    Raises:
        ValueError: the backend cannot run this model.
    """

    def __init__(self, opt: ExampleOptimizer, loss_fn: LossFunction, backend: Backend) -> None:
        backend.check({parameter.device for parameter in opt.model.parameters()})
        self.opt = opt
        self.loss_fn = loss_fn
        self.backend = backend
        self._network = OfNetwork(opt.model)
        self._reach = Reach([loss_fn, opt.model], opt, self._network)
        self._recordings: dict[Hashable, _Recording] = {}
        self._refused: dict[Hashable, str] = {}
        self._used: dict[Hashable, int] = {}  # the number of the call that last used a recording
        self._calls = 0
        self._met: set[Hashable] = set()
        self._made: dict[Hashable, int] = {}  # the number of the call at which a program was made
        self._given_up: Counter[Hashable] = Counter()
        self._generators: list[torch.Generator] = []
        self._report = Report()

    def report(self) -> Report:
        """How many steps were recorded, replayed and run eagerly, and why."""
        return self._report

    def __call__(self, *batch: Any, divisor: float | None = None, loss_scale: float = 1.0) -> StepStats:
        """Do what ``opt.backward(loss_fn(*batch))`` does, and return the same figures.

        Args:
            *batch: what the loss function takes: tensors and anything else, in any nest.
            divisor: as in :meth:`engm.ExampleOptimizer.backward`.
            loss_scale: as there.

        Raises:
            Exception: whatever the loss function or ``backward`` raises.
        """
        leaves, spec = tree_flatten(batch)
        of_network = self._network.number()
        state = of_network, self._reach.number(of_network)
        call = _Call(self.opt, self.loss_fn, leaves, spec, state, divisor, loss_scale)
        reason = _reason_for_eager(self.opt) or call.reason_for_eager() or self._reach.unwatched
        if reason is not None:
            return self._eager(call, reason)
        self._calls += 1
        key = call.key()
        if key in self._refused:
            return self._eager(call, self._refused[key])
        known = self._recordings.get(key)
        if known is not None:
            self._used[key] = self._calls
            reason = known.why_not()
            if reason is not None:
                return self._give_up(call, key, reason)
            if self.opt.model.calibration.due(known.factors):
                return self._eager(call, "a calibration is due")
            if _comparison_is_due(self.opt, known.watched):
                return self._eager(call, "a comparison with autograd's gradients is due")
            return self._replay(call, key, known)
        if key not in self._met:
            if len(self._met) >= MOST_STATES:
                self._met.clear()
            self._met.add(key)
            return self._eager(call, "the first step of its kind")
        if not self._has_room():
            return self._eager(call, f"there are programs for {MOST_PROGRAMS} kinds of steps, and all are in use")
        return self._record(call, key)

    def _has_room(self) -> bool:
        """Whether another program can be kept; one that has not been used for long is given up for it."""
        if len(self._recordings) < MOST_PROGRAMS:
            return True
        oldest = min(self._recordings, key=self._used.__getitem__)
        if self._calls - self._used[oldest] < OUT_OF_USE:
            return False
        del self._recordings[oldest], self._used[oldest], self._made[oldest]
        return True

    def _give_up(self, call: _Call, key: Hashable, reason: str) -> StepStats:
        """Give up a program that does not hold; the next step of its kind is recorded anew, unless none ever lasts."""
        lasted = self._calls - self._made[key] >= LASTING
        self._given_up[key] = 1 if lasted else self._given_up[key] + 1
        del self._recordings[key], self._used[key], self._made[key]
        if self._given_up[key] >= MOST_GIVEN_UP:
            self._refuse(key, reason)
        return self._eager(call, reason)

    def _refuse(self, key: Hashable, reason: str) -> None:
        if len(self._refused) >= MOST_STATES:
            self._refused.clear()
        self._refused[key] = reason
        if reason not in self._report.refused:
            self._report.refused.append(reason)

    def _eager(self, call: _Call, reason: str) -> StepStats:
        self._report.eager[reason] += 1
        return call.run()

    def _replay(self, call: _Call, key: Hashable, recording: _Recording) -> StepStats:
        before = recording.before(self.opt) if recording.watches else None
        outputs = recording.program(call.inputs())
        if before is not None and bool(outputs.pop()):
            before.put_back()
            return self._give_up(call, key, NO_LONGER_HOLDS)
        gradients, figures, carried, left = _split(recording, outputs)
        stats = StepStats(**{**recording.other_figures, **figures})
        if stats.losses.device.type == "cpu":
            check_finite(stats.losses)
        add_gradients(gradients)
        for leaf in recording.cleared:
            leaf.grad = None
        for leaf, gradient in left:
            leaf.grad = gradient
        self.opt.carry(carried)
        self.opt.model.engm_watch.steps += len(recording.watched)
        self._report.replayed += 1
        self._report.length = recording.program.length
        return self.opt.after_program(stats)

    def _record(self, call: _Call, key: Hashable) -> StepStats:
        """Record the step, replay it, and run it eagerly on the same data; what the last has done stays.

        The program is kept if the step, its replay and what the backend makes of it give the same bits by kernels that
        repeat; where torch has none for an operator, or the backend fuses them, the same numbers but for rounding.
        """
        before = Before(self.opt, self._generators, self._reach)
        tensors = self._reach.tensors()
        found: _Recording | UnrecordableError
        got: list[Tensor] = []
        made_got: list[Tensor] = []
        fused_agrees = True
        device = next(self.opt.model.parameters()).device
        try:
            try:
                found, program, module = _recording_of(call, before)
                with repeatable_kernels(device):
                    got = _tried(found, call, before)
                    if not self.backend.fuses:
                        found = replace(found, program=self.backend.made(program, module, call.inputs()))
                        if found.program is not program:
                            made_got = _tried(found, call, before)
                if self.backend.fuses:
                    plain = _tried(found, call, before)
                    found = replace(found, program=self.backend.made(program, module, call.inputs()))
                    fused = _tried(found, call, before)
                    fused_agrees = program.tolerance.holds(fused, plain, len(found.reached))
                elif device.type == "cuda":  # with the kernels that are chosen otherwise
                    found = replace(found, program=self.backend.made(program, module, call.inputs()))
            finally:
                before.put_back()
        except UnrecordableError as error:
            found = error
            self._generators += before.new_generators()
            if len(self._generators) > MOST_GENERATORS:
                self._generators.clear()
                found = UnrecordableError(
                    "the step makes generators of random numbers anew: make them before", for_good=True
                )
        except DueError as error:
            found = UnrecordableError(str(error))
        except Exception as error:
            found = UnrecordableError(in_words(error), for_good=True)
        if isinstance(found, UnrecordableError):
            stats = self._eager(call, found.reason)
            if found.for_good:  # and not because of an error that the step has by itself
                self._refuse(key, found.reason)
            return stats
        in_view = before.reads_a_view(program)
        found.held.extend(item for item in tensors if found.program.reads(item[1]) or in_view(item[1]))
        found.held.extend(self._reach.holders([holder for (holder, _), _ in found.held]))
        found.written.extend([*before.written_buffers, *(memory for memory, _ in before.written)])
        found.draws.extend(generator for generator, _ in before.drawn_from)
        found.given.update(before.given)
        call.clear_gradients()
        model = self.opt.model
        model.engm_observer = lambda _, skeleton: found.watched.append(skeleton) if model.strict else None
        try:
            with repeatable_kernels(device) as unrepeatable:
                stats = call.run()
        except BaseException:
            before.put_back_gradients()
            raise
        finally:
            model.engm_observer = None
        gradients = [parameter.grad for parameter in found.reached if parameter.grad is not None]
        every = [(p, p.grad) for p, _ in before.gradients if p.grad is not None]
        want = [*gradients, *(getattr(stats, name) for name in found.figures)]
        want += [self.opt.carried()[name] for name in found.carried]
        want += [leaf.grad for leaf, _ in found.left if leaf.grad is not None] + before.tensors_now()
        before.put_back_gradients()
        add_gradients(every)

        def same(got: list[Tensor]) -> bool:
            rounded = bool(unrepeatable) and program.tolerance.holds(got, want, len(gradients))
            return all_the_same(got, want) or rounded

        if len(every) != len(gradients) or not same(got):
            self._refuse(key, "replayed, the recorded step gives other numbers than the step itself")
        elif not fused_agrees or (made_got and not same(made_got)):
            self._refuse(key, f"run by {self.backend.name}, the recorded step gives other numbers than the step itself")
        else:
            self._recordings[key] = found
            self._used[key] = self._made[key] = self._calls
            self._report.recorded += 1
        self._report.eager[COMPARED] += 1
        return stats


class _Call:
    """One call of a step."""

    def __init__(
        self,
        opt: ExampleOptimizer,
        loss_fn: LossFunction,
        leaves: list[Any],
        spec: Any,
        state: Hashable,
        divisor: float | None,
        loss_scale: float,
    ) -> None:
        self.opt = opt
        self._state = state
        self._loss_fn = loss_fn
        self._leaves = leaves
        self._spec = spec
        self._options: dict[str, Any] = {"divisor": divisor, "loss_scale": loss_scale}
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        number = {id(tensor): k for k, tensor in reversed([*enumerate(self.tensors)])}
        self._first = [number[id(tensor)] for tensor in self.tensors]  # the first place of each one

    def reason_for_eager(self) -> str | None:
        """Why this batch runs eagerly; None where a program may do."""
        odd = [type(leaf).__name__ for leaf in self._leaves if not isinstance(leaf, (*PLAIN, Tensor))]
        return f"the batch has a {odd[0]} in it, into which a program cannot look" if odd else None

    def key(self) -> Hashable:
        """What a program for this call depends on."""
        opt = self.opt
        device = next(opt.model.parameters()).device
        carried = [(name, of_leaf(tensor)) for name, tensor in opt.carried().items()]
        factors = [(key, of_leaf(tensor)) for key, tensor in opt.model.calibration.carried().items()]
        return (
            tuple(map(of_leaf, self._leaves)),
            tuple(self._first),
            self._spec,
            tuple(self._options.values()),
            tuple(carried),
            tuple(factors),
            opt.model.calibration.verdicts(),
            opt.model.calibration.missing(),
            self._state,
            of_torch(device),
        )

    def run(self) -> StepStats:
        """The step as it is without recording."""
        return self.run_with(self.tensors)

    def run_with(self, tensors: Sequence[Tensor], check: bool | None = None) -> StepStats:
        """The step for other tensors in the batch."""
        given = iter([tensors[number] for number in self._first])
        for tensor, original in zip(tensors, self.tensors, strict=True):
            if tensor is not original and vars(original):
                vars(tensor).update(vars(original))
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        found = self._loss_fn(*tree_unflatten(leaves, self._spec))
        if not isgenerator(found):
            return self._backward(found, check)
        with contextmanager(lambda: found)() as losses:
            return self._backward(losses, check)

    def _backward(self, found: Any, check: bool | None) -> StepStats:
        """What the optimizer does with what the loss function returned."""
        measurement: Measurement | None = None
        if isinstance(found, tuple):
            if len(found) != 2:
                raise TypeError(
                    f"loss_fn must return losses or (losses, measurement), it returned {len(found)} values."
                )
            found, measurement = found
        return self.opt.backward(found, measurement=measurement, check=check, **self._options)

    def inputs(self) -> list[Tensor]:
        """What a program reads: tensors of batch, optimizer and calibration, and the optimizer's numbers as tensors."""
        opt, like = self.opt, next(self.opt.model.parameters())
        numbers = [like.new_full((), number, dtype=torch.float64) for number in opt.numbers().values()]
        return [*self.tensors, *opt.carried().values(), *opt.model.calibration.carried().values(), *numbers]

    def clear_gradients(self) -> None:
        """No parameter has a gradient any more."""
        for parameter in self.opt.model.parameters():
            parameter.grad = None


def _tried(recording: _Recording, call: _Call, before: Before) -> list[Tensor]:
    """What a recording leaves, run from the state before the step: outputs, buffers and states of random numbers."""
    before.put_back()
    call.clear_gradients()
    outputs = recording.program(call.inputs())
    if recording.watches:
        outputs.pop()
    return outputs + before.tensors_now()


def _recording_of(call: _Call, before: Before) -> tuple[_Recording, Program, GraphModule]:
    """Record a call: what it is, its program, and the operators that this was made of.

    Raises:
        UnrecordableError: it cannot be recorded, today or ever.
    """
    opt, model = call.opt, call.opt.model
    names, keys, data = list(opt.carried()), list(model.calibration.carried()), len(call.tensors)
    numbers, last = list(opt.numbers()), data + len(names) + len(keys)
    baked: list[tuple[Tensor, Tensor]] = []  # what the program depends on, and whether that is not what it was
    graphs: list[PlannedGraph] = []
    described: list[Any] = []
    ends: list[int] = []  # of the outputs: of what the step leaves, of the surprises

    def observe(graph: PlannedGraph, _: Hashable) -> None:
        _refuse_unsettled(graph)
        graphs.append(graph)
        known: list[Tensor] = []
        for tensor in graph.plan.tensors():
            constant(tensor)
        with recomputed_once():
            for route in graph.plan.routes:
                constant(route.values)
                now: Any = saved_tensors_of(graph.trace.order[route.position], route.name)[route.number]
                if all(now is not other for other in known):
                    known.append(now)
                    baked.append((now, (now != route.values).any()))

    def function(*inputs: Tensor) -> list[Tensor]:
        opt.carry(dict(zip(names, inputs[data:], strict=False)))
        model.calibration.carry(dict(zip(keys, inputs[data + len(names) : last], strict=True)))
        vars(opt).update(zip(numbers, inputs[last:], strict=True))
        with before.noting():
            stats = call.run_with(inputs[:data], check=False)
        reached = [p for p in model.parameters() if p.grad is not None]
        figures: dict[str, Tensor] = {k: value for k, value in vars(stats).items() if isinstance(value, Tensor)}
        others = {name: value for name, value in vars(stats).items() if name not in figures}
        after = opt.carried()
        changed = {
            name: after[name] for name, given in zip(names, inputs[data:], strict=False) if after[name] is not given
        }
        baked.extend((value, _became_another(value)) for value in take_decisions())
        surprises = [*(surprise for graph in graphs for surprise in graph.surprises), *take_surprises()]
        another = [(leaf, had is not None) for leaf, had in before.other_gradients if leaf.grad is not had]
        elsewhere = [(leaf, had) for leaf, had in another if leaf.grad is not None]
        cleared = [leaf for leaf, _ in another if leaf.grad is None]
        described[:] = reached, tuple(figures), others, tuple(changed), elsewhere, cleared
        done = [*(p.grad for p in reached if p.grad is not None), *figures.values(), *changed.values()]
        done += [leaf.grad for leaf, _ in elsewhere if leaf.grad is not None]
        ends[:] = len(done), len(done) + len(surprises)
        return [*done, *surprises, *(flag for _, flag in baked), *(value for value, _ in baked)]

    call.clear_gradients()
    torch.clear_autocast_cache()
    model.calibration.asked.clear()
    model.engm_observer = observe
    take_decisions()
    take_surprises()
    take_constants()
    try:
        module, outputs = recorded(function, call.inputs())
    finally:
        model.engm_observer = None
    first, last_surprise = ends
    if any(map(bool, outputs[first:last_surprise])):
        raise UnrecordableError(NO_LONGER_HOLDS)
    if hang_on_data(module, last_surprise + len(baked), data):
        raise UnrecordableError(
            "rows are moved by the batch's data, so that whose they are is looked at", for_good=True
        )
    there = hang_on_what_was_there(module, data)[last_surprise + len(baked) :]
    flags = [number for number, hangs in enumerate(there, last_surprise) if hangs]
    watches = watch_any(module, first, [*range(first, last_surprise), *flags])
    module = cleaned(module)
    unknown = unknown_tensor(module, [*before.tensors(), *take_constants()], call.inputs())
    program = Program(module)
    factors = {key: names for key, names in model.calibration.asked.items() if key in keys}
    beyond = before.changed_beyond_a_program(program)
    if beyond is not None:
        raise UnrecordableError(beyond, for_good=True)
    if unknown is not None:
        raise UnrecordableError(f"{unknown} {OF_THE_STEP}", for_good=True)
    reached, figures, others, carried, left, cleared = described
    recording = _Recording(program, reached, figures, others, carried, factors, watches, left=left, cleared=cleared)
    return recording, program, module


def _became_another(value: Tensor) -> Tensor:
    """What tells, when the program is run, whether the truth of a 0-dimensional tensor is another than now."""
    with unrecorded():
        answer = bool(value)
    return value != answer


def _refuse_unsettled(graph: PlannedGraph) -> None:
    """Refuses graphs whose plans are not known to hold for the next step.

    Raises:
        UnrecordableError: see there.
    """
    plan = graph.plan
    if plan.told is not None or not plan.keeps:
        raise UnrecordableError(
            "rows are moved by data, or hooks change gradients, so that whose rows are whose is measured at every step",
            for_good=True,
        )
    if plan.blind:
        raise UnrecordableError("some gradients are not finite")
    if graph.trace.tokens:
        raise UnrecordableError("a part of the network is compiled: leave that to the recorded step", for_good=True)


def _reason_for_eager(opt: ExampleOptimizer) -> str | None:
    """Why this very step runs eagerly, whatever is recorded."""
    if opt.model.shard_group is not None or (in_processes() and dist.get_world_size() > 1):
        return "several processes work together"
    if None in modes_on():
        return "a TorchFunctionMode or TorchDispatchMode is on, which takes part in what torch does"
    if has_gradient_hooks(parameter for _, parameter in opt.model.trainable_parameters()):
        return "hooks hang on parameters, which autograd alone runs"
    return opt.eager_reason()


def _comparison_is_due(opt: ExampleOptimizer, watched: Sequence[Hashable]) -> bool:
    model = opt.model
    return any(model.engm_watch.would_be_due(s, model.check_every, k) for k, s in enumerate(watched, 1))


def _split(
    recording: _Recording, outputs: Sequence[Tensor]
) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor], dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Gradients by parameter, figures and carried tensors by name, and gradients of other leaves."""
    given = iter(outputs)
    gradients = [(parameter, next(given)) for parameter in recording.reached]
    figures = {name: next(given) for name in recording.figures}
    carried = {name: next(given) for name in recording.carried}
    return gradients, figures, carried, [(leaf, next(given)) for leaf, _ in recording.left]


def record(opt: ExampleOptimizer, loss_fn: LossFunction, *, backend: str = "replay") -> RecordedStep:
    """A training step that is recorded once as a straight-line program, and replayed from then on.

    ``step(*batch)`` does what ``opt.backward(loss_fn(*batch))`` does, and gives the same bits (with ``"inductor"``, the
    same numbers but for rounding): gradients are added to ``p.grad``, batch norms take note of their statistics, random
    numbers are drawn. What costs host time in a step, hooks and rules and the walk through the graph, is gone. The
    first step of every kind (batch size, modes, options) runs eagerly; the second is recorded, replayed and run, and
    the program is kept where all give the same bits.

    Steps at which something else is due run eagerly: calibrations of batch norm, regressions of A-ENGM, comparisons
    with autograd's gradients; and steps that cannot be recorded: where data move rows between examples, or decide what
    runs. :meth:`RecordedStep.report` says how many and why.

    Args:
        opt: an engm optimizer.
        loss_fn: takes a batch, calls the wrapped model (and an attack, if it likes), and returns losses ``[n]`` or
            ``(losses, measurement)``. Tensors that it reads besides its arguments are read anew at every step. Modes
            and options of the network and the optimizer, and plain values that your own functions read, are looked at;
            whatever else it reads is taken to be as it was when the step was recorded. A program holds for any alpha,
            see :meth:`engm.ExampleOptimizer.numbers`. A function that yields its losses, once, goes on after the
            backward pass: it may perturb weights and put them back, as :class:`engm.adversarial.AWP` does.
        backend: how programs run. ``"replay"``: as they are. ``"inductor"``: compiled by Inductor; steps are then equal
            but for rounding, and random numbers are the same. ``"cudagraph"``: as CUDA graphs; the model has to be on
            one CUDA device. Programs that a backend cannot run are refused, with the reason in the report, and these
            steps run eagerly.

    Raises:
        TypeError: ``opt`` is no engm optimizer.
        ValueError: the backend is not known, or cannot run a model where this one is.
    """
    if not isinstance(opt, ExampleOptimizer):
        raise TypeError(f"record expects an engm optimizer, got {type(opt).__name__}: wrap it, engm.MSGD(model, opt).")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {tuple(BACKENDS)}, got {backend!r}.")
    return RecordedStep(opt, loss_fn, BACKENDS[backend]())
