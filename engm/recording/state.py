"""What a step changes besides gradients, to be put back where a step is tried more than once."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..module import GradNormModule
from ..optim import ExampleOptimizer
from ..torch_internals import (
    Memory,
    Operators,
    address_of,
    all_memory_of,
    deciding_sizes,
    moved_statistics,
    schema_of,
    tensors_in,
    unrecorded,
    version_of,
    written_operands,
)
from .guards import Reach
from .places import at, put_at, said
from .program import Program
from .reads import HostReads
from .refusals import UnrecordableError
from .waits import overlaps


class Before:
    """Everything as it is before a step: buffers, gradients, random numbers, and the counters of the engine.

    Args:
        opt: the optimizer.
        generators: those that steps draw from.
        reach: where the step's code finds what else it reads.

    Attributes:
        buffers: of the network, with copies.
        names: of these.
        written: other memory from before the step that operators wrote into while it was noted, with copies.
        drawn_from: generators (None: torch's own), with their states before the first draw.
        known_generators: those that may be drawn from, which are put back.
        written_buffers: those of the network's that operators wrote into while it was noted.
        other_gradients: the leaves of autograd's graph in reach that are no parameters of the network, with gradients.
        given: buffers of integers whose numbers Python was given while the step was noted, by name, with copies.
    """

    def __init__(
        self,
        opt: ExampleOptimizer,
        generators: Iterable[torch.Generator] = (),
        reach: Reach | None = None,
    ) -> None:
        model: GradNormModule = opt.model
        self._opt = opt
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self.names = [name for name, _ in model.named_buffers()]
        self.written_buffers: list[Tensor] = []
        self.given: dict[str, tuple[Tensor, Tensor]] = {}
        self.gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
        devices = {p.device for p in model.parameters() if p.is_cuda}
        self._random: list[tuple[Any, Tensor]] = [(None, torch.get_rng_state())]
        self._random += [(device, torch.cuda.get_rng_state(device)) for device in sorted(devices, key=str)]
        self._carried = opt.carried()
        self._counted = [(thing, dict(vars(thing))) for thing in (opt, model.calibration, model.engm_watch)]
        self._draws = [(sample, sample.draws) for sample in (model.calibration.sample, model.calibration.shared_sample)]
        self._of_python = _random_of_python()
        self._generators = [(generator, generator.get_state()) for generator in generators]
        self.known_generators = [None, *(generator for generator, _ in self._generators)]
        self.drawn_from: list[tuple[torch.Generator | None, Tensor]] = []
        self.written: list[tuple[Tensor, Tensor]] = []
        held = [] if reach is None else reach.values()
        carried = {id(tensor) for tensor in self._carried.values()}
        self._held = [(place, value) for place, value in held if id(value) not in carried]
        self._containers = [] if reach is None else [(held, _parts(held)) for held in reach.containers()]
        there = [*model.parameters(), *model.buffers(), *(value for _, value in held if isinstance(value, Tensor))]
        there += [] if reach is None else reach.cached()
        # With tensors of the same memory, to be put back where a step gives them other memory.
        self._there = {id(tensor): (tensor, tensor.detach()) for tensor in there if not is_lazy(tensor)}
        self._versions = [(tensor, version_of(tensor)) for tensor, _ in self._there.values()]
        self._unseen = False  # whether something was written into where nobody looks
        own = {id(parameter) for parameter, _ in self.gradients}
        leaves = [t for t, _ in self._there.values() if t.is_leaf and t.requires_grad and id(t) not in own]
        self.other_gradients = [(leaf, leaf.grad) for leaf in leaves]

    @contextmanager
    def noting(self) -> Iterator[None]:
        """A context in which what random numbers are drawn from, and what is written into, is noted before it is.

        Operators and functions by which the host reads data raise RuntimeError in it, and operators that draw from a
        generator that is not known UnrecordableError. An error that the code within catches is raised at the end.
        """
        noting = _Noting(self)
        with noting, noting.reads:
            yield
        self.written_buffers = [buffer for buffer, _ in self.buffers if noting.may_have_written_into(buffer)]
        self._unseen = any(version_of(t) != v and not noting.may_have_written_into(t) for t, v in self._versions)
        if noting.errors:
            raise noting.errors[0]

    def put_back(self) -> None:
        """Everything as it was."""
        torch.clear_autocast_cache()  # what was cast while a step was traced belongs to that
        for tensor, memory in self._moved():
            tensor.data = memory
        known = [generator for generator, _ in self._generators]
        for generator, state in self._generators + [item for item in self.drawn_from if item[0] not in known]:
            if generator is not None:
                generator.set_state(state)
        with torch.no_grad():
            for buffer, value in self.buffers:
                if not overlaps(buffer):  # nothing can write into one that does
                    buffer.copy_(value)
            for memory, value in self.written:
                memory.copy_(value)
        self.put_back_gradients()
        for leaf, gradient in self.other_gradients:
            leaf.grad = gradient
        for container, parts in self._containers:
            if not _are(container, parts):
                _fill(container, parts)
        for device, state in self._random:
            if device is None:
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, device)
        of_python, of_numpy = self._of_python
        random.setstate(of_python)
        if of_numpy is not None:
            sys.modules["numpy"].random.set_state(of_numpy)
        for thing, attributes in self._counted:
            vars(thing).update(attributes)
        for sample, draws in self._draws:
            sample.draws = draws
        self._opt.carry(self._carried)
        for place, value in self._changed_places():
            put_at(place, value)

    def put_back_gradients(self) -> None:
        """The gradients as they were."""
        for parameter, gradient in self.gradients:
            parameter.grad = gradient

    def new_generators(self) -> list[torch.Generator]:
        """The generators that were drawn from and not known of before the step."""
        return [g for g, _ in self.drawn_from if g is not None and g not in self.known_generators]

    def changed_beyond_a_program(self, program: Program) -> str | None:
        """What a step changed that this program of it cannot change again, in words; None where there is nothing."""
        if str(_random_of_python()) != str(self._of_python):
            return "the step draws random numbers from Python or NumPy, which a program cannot repeat: use torch's"
        states = [(None, self._random[0][1]), *self._generators]
        seeded = [g for g, state in states for drawn, first in self.drawn_from if drawn is g and not state.equal(first)]
        if seeded:
            return "the step seeds the random numbers that it draws, which a program would go on drawing: seed before"
        changed = [
            said(place)
            for place, value in self._changed_places()
            if not isinstance(value, Tensor) or program.reads(value)  # others are only left there
        ]
        if changed:
            return (
                f"the step puts other values in the place of {', '.join(changed[:3])}, which a program cannot do again"
            )
        grown = [parts for container, parts in self._containers if not _are(container, parts)]
        if any(isinstance(part, Tensor) and program.reads(part) for parts in grown for part in parts):
            return "the step puts others into a list of tensors that it reads, which a program cannot do again"
        if self._unseen:
            return "a tensor is written into where torch's tracer does not look, in another thread perhaps"
        if self._moved():
            return "the step gives a tensor other memory (tensor.data = ...), which a program cannot: write into it"
        now = dict(self._opt.model.named_buffers())
        known = {id(buffer) for buffer, _ in self.buffers}
        replaced = [name for name, buffer in now.items() if id(buffer) not in known]
        if replaced:
            return f"the step puts new tensors in the place of buffers ({', '.join(replaced[:3])}): write into the old"
        return None

    def tensors(self) -> list[Tensor]:
        """The tensors that were there before the step, as far as its code finds them."""
        return [tensor for tensor, _ in self._there.values()]

    def reads_a_view(self, program: Program) -> Callable[[Tensor], bool]:
        """What tells whether a program reads other tensors than these with a tensor's memory."""
        views = Memory()
        for tensor in program.tensors():
            if id(tensor) not in self._there:
                views.add(tensor)
        return views.__contains__

    def _moved(self) -> list[tuple[Tensor, Tensor]]:
        """The tensors that have other memory now, with tensors of the memory that they had."""
        return [
            (tensor, memory)
            for tensor, memory in self._there.values()
            if tensor.layout == torch.strided and address_of(tensor) != address_of(memory)
        ]

    def tensors_now(self) -> list[Tensor]:
        """Copies of the buffers, of other memory that was written into, and of the random numbers' states as now."""
        now = [tensor.detach().clone() for tensor, _ in (*self.buffers, *self.written)]
        return [*now, torch.get_rng_state(), *[torch.cuda.get_rng_state(device) for device, _ in self._random[1:]]]

    def _changed_places(self) -> list[tuple[Any, Any]]:
        """What the step's code reads and has changed since, and what it was."""
        return [
            (place, value) for place, value in self._held if at(place) is not value and not _equal(at(place), value)
        ]


class BeforeReplay:
    """What a program may change by itself, as it is before the program runs.

    Args:
        memory: that it writes into.
        generators: that it draws from; None: torch's own.
        device: where the model is.
    """

    def __init__(
        self, memory: Iterable[Tensor], generators: Iterable[torch.Generator | None], device: torch.device
    ) -> None:
        self._memory = [(each, each.clone()) for each in memory]
        self._device = device
        self._states = [(generator, self._states_of(generator)) for generator in generators]

    def _states_of(self, generator: torch.Generator | None) -> list[Tensor]:
        if generator is not None:
            return [generator.get_state()]
        on_device = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *on_device]

    def put_back(self) -> None:
        """Everything as it was."""
        with torch.no_grad():
            for memory, value in self._memory:
                memory.copy_(value)
        for generator, (state, *on_device) in self._states:
            if generator is None:
                torch.set_rng_state(state)
            else:
                generator.set_state(state)
            for each in on_device:
                torch.cuda.set_rng_state(each, self._device)


class _Noting(Operators):
    """Notes what operators draw from, and what they write into that was there before; refuses what the host reads."""

    def __init__(self, before: Before) -> None:
        super().__init__()
        self._known = before.known_generators
        self._found = before.drawn_from
        self._written = before.written
        self._made = Memory()  # by the step
        self._kept = Memory()
        self._changed = Memory()
        self._given = before.given
        self._integers: list[tuple[Memory, str, tuple[Tensor, Tensor]]] = []
        self.errors: list[Exception] = []
        self.reads = HostReads(self._may_be_read, self.errors.append, [p for p, _ in before.gradients])
        for name, (buffer, value) in zip(before.names, before.buffers, strict=True):
            self._kept.add(buffer)
            if not buffer.is_floating_point():
                memory = Memory()
                memory.add(buffer)
                self._integers.append((memory, name, (buffer, value)))

    def before(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        try:
            self._look_at(func, args, kwargs)
        except Exception as error:
            self.failed(error)
            raise

    def failed(self, error: Exception) -> None:
        self.errors.append(error)

    def _look_at(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)]
            generator = given[0] if given else None
            if all(known is not generator for known, _ in self._found):
                self._found.append((generator, torch.get_rng_state() if generator is None else generator.get_state()))
            if all(known is not generator for known in self._known):
                raise UnrecordableError("random numbers come from a generator that was not known yet")
        if schema_of(func).is_mutable:
            self._keep(written_operands(func, args, kwargs))
        self._keep(moved_statistics(func, args, kwargs))
        if not all(map(self._may_be_read, deciding_sizes(func, args))):
            raise RuntimeError(f"data decide the sizes of what {func} returns")
        reads = torch.Tag.data_dependent_output in func.tags
        self.reads.of_operators += reads
        self.reads.made_constant |= func is torch.ops.aten.lift_fresh.default
        if reads and not all(t in self._made or self._may_be_read(t) for t in tensors_in((args, kwargs))):
            raise RuntimeError(f"{func} reads values of a tensor, which may be others at the next step")

    def after(self, func: Any, result: Any) -> None:
        if func is torch.ops.aten.lift_fresh.default or all(r.alias_info is None for r in schema_of(func).returns):
            for tensor in tensors_in(result):
                self._made.add(tensor)

    def may_have_written_into(self, tensor: Tensor) -> bool:
        """Whether a tensor may hold other numbers now."""
        return (tensor in self._changed or tensor.layout != torch.strided) and not overlaps(tensor)

    def _may_be_read(self, tensor: Tensor) -> bool:
        """Whether Python may be given a tensor's numbers, because a program holds for them alone.

        They are those of a buffer of integers of the network into which the step has not written yet.
        """
        found = {name: numbers for memory, name, numbers in self._integers if tensor in memory}
        if tensor in self._changed:
            return False
        self._given.update(found)
        return bool(found)

    def _keep(self, tensors: Sequence[Any]) -> None:
        for tensor in tensors_in(tensors):
            self._changed.add(tensor)
            if tensor.layout == torch.strided and tensor not in self._made and tensor not in self._kept:
                self._kept.add(tensor)
                with unrecorded(), torch.no_grad():
                    memory = all_memory_of(tensor)
                    self._written.append((memory, memory.clone()))


def _random_of_python() -> tuple[Any, Any]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def _parts(container: Any) -> list[Any]:
    """What is in a list, deque or dictionary: the values, behind the keys."""
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _are(container: Any, parts: Sequence[Any]) -> bool:
    now = _parts(container)
    return len(now) == len(parts) and all(a is b for a, b in zip(now, parts, strict=True))


def _fill(container: Any, parts: Sequence[Any]) -> None:
    """Put back what was in a container."""
    container.clear()
    if isinstance(container, dict):
        half = len(parts) // 2
        container.update(zip(parts[:half], parts[half:], strict=True))
    else:
        container.extend(parts)


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
