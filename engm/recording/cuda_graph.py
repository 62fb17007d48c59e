"""Recorded steps as CUDA graphs: the operators of a program are captured once and launched as a whole from then on.

A graph knows memory by its address. The inputs of a program are therefore copied into tensors that stay, its outputs
are copied out of such, and what it reads besides has to stay where it was. The graphs of one recorded step share the
memory of what they compute with in between: they never run at the same time, and nothing is left there between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, fx

from ..torch_internals import copy_each
from .program import Program, Runnable, attribute_of
from .refusals import UnrecordableError
from .waits import is_number, obstacles

WARM_UPS = 3  # runs before the capture: libraries choose kernels and allocate what they keep
Work = Callable[[], list[Tensor]]


class Captured(Protocol):
    """Work that was captured.

    Attributes:
        outputs: what it returned; every replay writes into these very tensors.
    """

    outputs: list[Tensor]

    def replay(self) -> None:
        """Do the work again, on the same memory."""


class Capturing(Protocol):
    """What captures work on a device."""

    def captured(self, work: Work, generators: Sequence[torch.Generator]) -> Captured:
        """Capture what the work runs on the device; it is run a few times before.

        Args:
            work: runs operators and returns tensors; the operators read and write the same memory at every run.
            generators: what the work draws from, besides torch's own generator.
        """

    def turn(self) -> AbstractContextManager[None]:
        """A context for one use of what was captured: it begins on the device when the last one has ended there."""


class OnDevice:
    """Captures work on a CUDA device, all on one side stream and with one pool of memory.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._used = torch.cuda.Event()
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._stream = torch.cuda.Stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()

    def captured(self, work: Work, generators: Sequence[torch.Generator]) -> Captured:
        with torch.cuda.device(self._device), self.turn():
            current, stream = torch.cuda.current_stream(), self._stream
            stream.wait_stream(current)
            # The stream's own context: torch's capture leaves its stream current where it fails.
            with torch.cuda.stream(stream):
                try:
                    for _ in range(WARM_UPS):
                        work()
                finally:
                    current.wait_stream(stream)
                return self._captured_on(stream, work, generators)  # runs nothing

    def _captured_on(self, stream: torch.cuda.Stream, work: Work, generators: Sequence[torch.Generator]) -> Captured:
        own = [torch.cuda.default_generators[torch.cuda.current_device()], *generators]
        states = [generator.clone_state() for generator in own]
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        try:
            # Other threads (a loader that pins memory) go on meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                outputs = work()
        except Exception:
            # What took part in a capture that failed is still capturing: the generators, the stream and the pool.
            for generator, state in zip(own, states, strict=True):
                generator.graphsafe_set_state(state)
            self._start_afresh()
            raise
        return _OnDevice(graph, outputs)

    @contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            current.wait_event(self._used)
            try:
                yield
            finally:
                self._used.record(current)


class _OnDevice:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: list[Tensor]) -> None:
        self._graph = graph
        self.outputs = outputs

    def replay(self) -> None:
        self._graph.replay()


class CudaGraphs:
    """Programs are captured as CUDA graphs.

    Args:
        capturing: what captures on a device.
        kind: the type of device that models have to be on.
    """

    name = "cudagraph"
    fuses = False

    def __init__(self, capturing: Callable[[torch.device], Capturing] = OnDevice, kind: str = "cuda") -> None:
        self._of_device: dict[torch.device, Capturing] = {}
        self._capturing = capturing
        self._kind = kind

    def check(self, devices: set[torch.device]) -> None:
        """Refuses models that are not on one CUDA device."""
        if len(devices) != 1 or next(iter(devices)).type != self._kind:
            where = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"backend='cudagraph' needs a model on one CUDA device, the parameters of this one are on {where}: "
                "move it there before, or use backend='replay' or 'inductor'."
            )

    def made(self, program: Program, module: fx.GraphModule, inputs: Sequence[Tensor]) -> Runnable:
        devices = {tensor.device for tensor in program.tensors() if isinstance(tensor, torch.nn.Parameter)}
        if len(devices) != 1 or next(iter(devices)).type != self._kind:
            raise UnrecordableError("the model is no longer on one CUDA device", for_good=True)
        (device,) = devices
        found = obstacles(module, device)
        if found:
            raise UnrecordableError(f"a CUDA graph cannot hold this step: {found[0]}", for_good=True)
        if device not in self._of_device:
            self._of_device[device] = self._capturing(device)
        return Graphed(program, _generators(module), inputs, device, self._of_device[device])


class Graphed:
    """A program that was captured.

    Args:
        program: the program.
        generators: what it draws from besides torch's own generator.
        inputs: an example.
        device: where it runs.
        capturing: captures it.

    Raises:
        UnrecordableError: it cannot be captured.
    """

    def __init__(
        self,
        program: Program,
        generators: Sequence[torch.Generator],
        inputs: Sequence[Tensor],
        device: torch.device,
        capturing: Capturing,
    ) -> None:
        self.length = program.length
        self.reads = program.reads
        self._read = program.tensors()
        self._addresses = self._addresses_now()
        self._capturing = capturing
        with torch.no_grad():
            # As they lie in memory: operators may have been recorded with the inputs' strides as arguments.
            self._inputs = [
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device if is_number(t) else t.device)
                for t in inputs
            ]
            _copy(self._inputs, [tensor.detach() for tensor in inputs])
            try:
                self._captured = capturing.captured(lambda: program(self._inputs), generators)
            except Exception as error:
                said = (str(error).strip().splitlines() or [""])[0]
                raise UnrecordableError(
                    f"the step cannot be captured as a CUDA graph: {type(error).__name__}: {said}", for_good=True
                ) from error

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs, which are as many and as large as those that were captured; new tensors."""
        with torch.no_grad(), self._capturing.turn():
            _copy(self._inputs, [tensor.detach() for tensor in inputs])
            self._captured.replay()
            outputs = [torch.empty_like(tensor) for tensor in self._captured.outputs]
            _copy(outputs, self._captured.outputs)
        return outputs

    def holds(self) -> bool:
        """Whether the tensors that the graph reads by their addresses have their memory there."""
        return self._addresses_now() == self._addresses

    def _addresses_now(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._read]


def _generators(module: fx.GraphModule) -> list[torch.Generator]:
    held = [attribute_of(module, str(node.target)) for node in module.graph.nodes if node.op == "get_attr"]
    found = {id(thing): thing for thing in held if isinstance(thing, torch.Generator)}
    return list(found.values())


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors one by one, by few kernels; the host does not wait for the device."""
    by_kind: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        if target.device != source.device:
            # Memory that is not pinned is read before the call returns, so that it may be written into afterwards.
            target.copy_(source, non_blocking=not source.is_pinned())
            continue
        pair = by_kind.setdefault(target.dtype, ([], []))
        pair[0].append(target)
        pair[1].append(source)
    for pair in by_kind.values():
        copy_each(*pair)
