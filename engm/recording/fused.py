"""Recorded steps compiled by Inductor: operators of torch are fused, engm's own are called as they are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..torch_internals import compiled_by_inductor, without_autocast
from .agreement import Tolerance
from .program import Program, Runnable, attribute_of, is_random
from .refusals import UnrecordableError


class Inductor:
    """Programs are compiled, which takes a minute for a network of twenty layers."""

    name = "inductor"

    def check(self, devices: set[torch.device]) -> None:
        """Nothing is refused."""

    def made(self, program: Program, module: fx.GraphModule, inputs: Sequence[Tensor]) -> Runnable:
        return Compiled(program, module, inputs)


class Compiled:
    """A recorded program compiled by Inductor.

    Parameters, buffers and other tensors from before the recording are inputs of what is compiled, so that they are
    read, and written into, as they are at every step.

    Args:
        program: the program.
        module: its operators; they are changed.
        inputs: an example.

    Raises:
        UnrecordableError: Inductor cannot compile it.
    """

    def __init__(self, program: Program, module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        self.length = program.length
        self.reads = program.reads
        self._tolerance = Tolerance.of(module)
        self._constants = _constants_as_inputs(module)
        self._kept = _keep_draws(module)
        try:
            self._run = compiled_by_inductor(module, [*self._constants, *inputs])
        except Exception as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            reason = f"Inductor cannot compile the step: {type(error).__name__}: {said[0]}"
            warnings.warn(f"{reason}. It runs without being compiled.", RuntimeWarning, stacklevel=2)
            raise UnrecordableError(reason, for_good=True) from error

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs, which are as many and as large as those that were recorded."""
        with torch.no_grad(), without_autocast():
            found: list[Tensor] = list(self._run(*self._constants, *inputs))
        return found[: len(found) - self._kept] if self._kept else found

    def holds(self) -> bool:
        """Always: tensors are handed over at every call."""
        return True

    def agrees(self, got: Sequence[Tensor], want: Sequence[Tensor], gradients: int) -> bool:
        """Whether the numbers are the same but for rounding; see :class:`.agreement.Tolerance`."""
        return self._tolerance.holds(got, want, gradients)


def _constants_as_inputs(module: fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph holds into its first inputs, and return them.

    Raises:
        UnrecordableError: the graph also holds a generator of random numbers, or operators that Inductor cannot run.
    """
    graph = module.graph
    # Compiled functions run with gradients off, where these layers keep nothing for the backward pass.
    if any(node.target is torch.ops.aten.mkldnn_rnn_layer.default for node in graph.nodes):
        raise UnrecordableError(
            "Inductor cannot run the backward pass of oneDNN's recurrent layers: use backend='replay'", for_good=True
        )
    first = next(node for node in graph.nodes if node.op == "placeholder")
    found: dict[int, tuple[Tensor, fx.Node]] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        constant = attribute_of(module, str(node.target))
        if not isinstance(constant, Tensor):
            raise UnrecordableError(
                f"Inductor cannot draw from the step's own {type(constant).__name__}: use backend='replay'",
                for_good=True,
            )
        if id(constant) not in found:
            with graph.inserting_before(first):
                found[id(constant)] = constant, graph.placeholder(f"constant_{len(found)}")
            found[id(constant)][1].meta.update(node.meta)
        node.replace_all_uses_with(found[id(constant)][1])
        graph.erase_node(node)
    module.recompile()
    return [constant for constant, _ in found.values()]


def _keep_draws(module: fx.GraphModule) -> int:
    """Hand out what is drawn at random and read by nobody, so that it is drawn; how many outputs come at the end."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    unread = [node for node in module.graph.nodes if is_random(node) and not node.users]
    results: Any = output.args[0]
    output.args = ([*results, *unread],)
    module.recompile()
    return len(unread)
