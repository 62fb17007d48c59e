"""What a step changes besides gradients, to be put back where a step is tried more than once."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..module import GradNormModule
from ..optim import ExampleOptimizer
from ..torch_internals import Operators, version_of


class Before:
    """Everything as it is before a step: buffers, gradients, random numbers, and the counters of the engine."""

    def __init__(self, opt: ExampleOptimizer, generators: Iterable[torch.Generator] = ()) -> None:
        model: GradNormModule = opt.model
        self._opt = opt
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self._versions = [version_of(buffer) for buffer, _ in self._buffers]
        self.gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
        devices = {p.device for p in model.parameters() if p.is_cuda}
        self._random: list[tuple[Any, Tensor]] = [(None, torch.get_rng_state())]
        self._random += [(device, torch.cuda.get_rng_state(device)) for device in sorted(devices, key=str)]
        self._carried = opt.carried()
        self._counted = [(thing, dict(vars(thing))) for thing in (opt, model.calibration, model.watch)]
        self._draws = [(sample, sample.draws) for sample in (model.calibration.sample, model.calibration.shared_sample)]
        self._of_python = _random_of_python()
        self._generators = [(generator, generator.get_state()) for generator in generators]
        self._drawn_from: list[tuple[torch.Generator | None, Tensor]] = []

    def noting_generators(self) -> Operators:
        """A context in which what random numbers are drawn from is noted, as it is before the first draw."""
        return _Noting(self._drawn_from)

    def put_back(self) -> None:
        """Everything as it was."""
        known = [generator for generator, _ in self._generators]
        for generator, state in self._generators + [item for item in self._drawn_from if item[0] not in known]:
            if generator is not None:
                generator.set_state(state)
        with torch.no_grad():
            for (buffer, value), version in zip(self._buffers, self._versions, strict=True):
                # Indices that were not written to are left alone, so that they count as unchanged; batch norms do not
                # tell that they write into their running statistics.
                if buffer.is_floating_point() or version_of(buffer) != version:
                    buffer.copy_(value)
        self.put_back_gradients()
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

    def put_back_gradients(self) -> None:
        """The gradients as they were."""
        for parameter, gradient in self.gradients:
            parameter.grad = gradient

    def new_generators(self) -> list[torch.Generator]:
        """The generators that were drawn from and not known of before the step."""
        known = [generator for generator, _ in self._generators]
        return [generator for generator, _ in self._drawn_from if generator is not None and generator not in known]

    def changed_beyond_a_program(self) -> str | None:
        """What a step changed that no program can change again, in words; None where there is nothing."""
        if str(_random_of_python()) != str(self._of_python):
            return "the step draws random numbers from Python or NumPy, which a program cannot repeat: use torch's"
        states = [(None, self._random[0][1]), *self._generators]
        seeded = [
            g for g, state in states for drawn, first in self._drawn_from if drawn is g and not state.equal(first)
        ]
        if seeded:
            return "the step seeds the random numbers that it draws, which a program would go on drawing: seed before"
        now = dict(self._opt.model.named_buffers())
        known = {id(buffer) for buffer, _ in self._buffers}
        replaced = [name for name, buffer in now.items() if id(buffer) not in known]
        if replaced:
            return f"the step puts new tensors in the place of buffers ({', '.join(replaced[:3])}): write into the old"
        return None

    def buffers_now(self) -> list[Tensor]:
        """Copies of the buffers as they are now."""
        return [buffer.detach().clone() for buffer, _ in self._buffers]


class _Noting(Operators):
    def __init__(self, found: list[tuple[torch.Generator | None, Tensor]]) -> None:
        super().__init__()
        self._found = found

    def before(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)]
            generator = given[0] if given else None
            if all(known is not generator for known, _ in self._found):
                self._found.append((generator, torch.get_rng_state() if generator is None else generator.get_state()))


def _random_of_python() -> tuple[Any, Any]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()
