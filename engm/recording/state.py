"""What a step changes besides gradients, to be put back where a step is tried more than once."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor

from ..module import GradNormModule
from ..optim import ExampleOptimizer


class Before:
    """Everything as it is before a step: buffers, gradients, random numbers, and the counters of the engine."""

    def __init__(self, opt: ExampleOptimizer) -> None:
        model: GradNormModule = opt.model
        self._opt = opt
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self.gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
        devices = {p.device for p in model.parameters() if p.is_cuda}
        self._random: list[tuple[Any, Tensor]] = [(None, torch.get_rng_state())]
        self._random += [(device, torch.cuda.get_rng_state(device)) for device in sorted(devices, key=str)]
        self._carried = opt.carried()
        self._counted = [(thing, dict(vars(thing))) for thing in (opt, model.calibration, model.watch)]
        self._draws = [(sample, sample.draws) for sample in (model.calibration.sample, model.calibration.shared_sample)]
        self._of_python = _random_of_python()

    def put_back(self) -> None:
        """Everything as it was."""
        with torch.no_grad():
            for buffer, value in self._buffers:
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

    def changed_beyond_a_program(self) -> str | None:
        """What a step changed that no program can change again, in words; None where there is nothing."""
        if str(_random_of_python()) != str(self._of_python):
            return "the step draws random numbers from Python or NumPy, which a program cannot repeat: use torch's"
        now = dict(self._opt.model.named_buffers())
        known = {id(buffer) for buffer, _ in self._buffers}
        replaced = [name for name, buffer in now.items() if id(buffer) not in known]
        if replaced:
            return f"the step puts new tensors in the place of buffers ({', '.join(replaced[:3])}): write into the old"
        return None

    def buffers_now(self) -> list[Tensor]:
        """Copies of the buffers as they are now."""
        return [buffer.detach().clone() for buffer, _ in self._buffers]


def _random_of_python() -> tuple[Any, Any]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()
