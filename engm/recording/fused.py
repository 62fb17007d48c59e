"""Recorded steps compiled by Inductor: operators of torch are fused, engm's own are called as they are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..torch_internals import compiled_by_inductor, schema_of, without_autocast
from .program import Program, Runnable, attribute_of, is_random, writes
from .refusals import UnrecordableError


class Inductor:
    """Programs are compiled, which takes a minute for a network of twenty layers."""

    name = "inductor"
    fuses = True

    def check(self, devices: set[torch.device]) -> None:
        """Nothing is refused."""

    def made(self, program: Program, module: fx.GraphModule, inputs: Sequence[Tensor]) -> Runnable:
        return Compiled(program, module, inputs)


class Compiled:
    """A recorded program compiled by Inductor.

    Parameters, buffers and other tensors from before the recording are inputs of what is compiled, so that they are
    read, and written into, as they are at every step. Random numbers are drawn before it runs, by the operators that
    draw them in the step by hand, and are inputs too: Inductor would draw in another order and for other strides.

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
        self._draws = _draws_of(module)
        self._constants = _constants_as_inputs(module)
        try:
            self._run = compiled_by_inductor(module, self._given(inputs))
        except Exception as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            reason = f"Inductor cannot compile the step: {type(error).__name__}: {said[0]}"
            warnings.warn(f"{reason}. It runs without being compiled.", RuntimeWarning, stacklevel=2)
            raise UnrecordableError(reason, for_good=True) from error

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs, which are as many and as large as those that were recorded."""
        with torch.no_grad(), without_autocast():
            return list(self._run(*self._given(inputs)))

    def _given(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [*self._constants, *inputs, *self._draws([])]

    def holds(self) -> bool:
        """Always: tensors are handed over at every call."""
        return True


def _draws_of(module: fx.GraphModule) -> Program:
    """Take the operators that draw random numbers out of a graph; their results are its last inputs from then on.

    They draw into new tensors with the strides of those that they drew into. What they drew into is overwritten, so
    that nothing but these strides matters.

    Raises:
        UnrecordableError: what is drawn depends on numbers that the step computes.
    """
    _split_dropout(module)
    graph, before = module.graph, fx.Graph()
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    generators: dict[str, Any] = {}
    drawn = []
    for node in [node for node in graph.nodes if is_random(node)]:
        inside: dict[fx.Node, fx.Node] = {}
        for source in node.all_input_nodes:
            held = attribute_of(module, str(source.target)) if source.op == "get_attr" else None
            if isinstance(held, torch.Generator):
                generators[str(source.target)] = held
                inside[source] = before.get_attr(str(source.target))
            elif source is node.args[0] and (writes(node) or _is_like(node)):
                like: Tensor = source.meta["val"]
                inside[source] = before.call_function(
                    torch.ops.aten.empty_strided.default,
                    (list(like.shape), list(like.stride())),
                    {"dtype": like.dtype, "device": like.device},
                )
            else:
                raise UnrecordableError(
                    f"the step draws random numbers by '{node.target}' for numbers that it computes, which Inductor "
                    "would do in another order: use backend='replay'",
                    for_good=True,
                )
        args: Any = fx.map_arg((node.args, node.kwargs), inside.__getitem__)
        drawn.append(before.call_function(node.target, *args))
        with graph.inserting_after(last):
            last = graph.placeholder(f"drawn_{len(drawn)}")
        found = last
        if writes(node):
            with graph.inserting_before(node):
                found = graph.call_function(torch.ops.aten.copy_.default, (node.args[0], last))
        node.replace_all_uses_with(found)
        graph.erase_node(node)
    before.output(drawn)
    return Program(fx.GraphModule(generators, before))


def _split_dropout(module: fx.GraphModule) -> None:
    """Make two of the operators that draw a mask and multiply by it at once, so that the mask is drawn by itself."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.native_dropout.default or node.args[2] is False:
            continue
        source, p = node.args[0], node.args[1]
        kept = 1 - p
        with graph.inserting_before(node):
            mask = graph.call_function(torch.ops.aten.empty_like.default, (source,), {"dtype": torch.bool})
            mask.meta["val"] = torch.empty_like(source.meta["val"], dtype=torch.bool)
            drawn = graph.call_function(torch.ops.aten.bernoulli_.float, (mask, kept))
            product = graph.call_function(torch.ops.aten.mul.Tensor, (source, drawn))
            result = graph.call_function(torch.ops.aten.mul.Tensor, (product, 1 / kept if kept else 0.0))
        for user in list(node.users):  # of the two results one each
            user.replace_all_uses_with((result, drawn)[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)


def _is_like(node: fx.Node) -> bool:
    """Whether an operator returns a tensor like one that it is given, of which it reads no number."""
    return str(schema_of(node.target).name).endswith("_like")


def _constants_as_inputs(module: fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph holds into its first inputs, and return them.

    Raises:
        UnrecordableError: the graph has operators that Inductor cannot run.
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
        if node.users:
            if id(constant) not in found:
                with graph.inserting_before(first):
                    found[id(constant)] = constant, graph.placeholder(f"constant_{len(found)}")
            node.replace_all_uses_with(found[id(constant)][1])
        graph.erase_node(node)
    module.recompile()
    return [constant for constant, _ in found.values()]
