"""Which calls ran what the rules of their layers hold for, as far as the graph tells.

A rule is found by a layer's type. What the layer then computes may be another thing: its parameter is a property, or of
a subclass of ``Parameter`` that scales what reads it; a network wrote a computed tensor in its place; a method, a
function of torch or a hook in front of ours was replaced. So a rule says by which operators its layers compute their
output (:attr:`engm.rules.Rule.operators`), and is believed where the call's nodes are those, and read the parameters
themselves. The parameters of other calls are accounted for where they enter. All of this is a part of the graph's
structure, so it holds for as long as a plan does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..rules.base import INPUT, OUTPUT, TURNED
from ..rules.entries import names_of
from ..torch_internals import (
    BATCH_NORMS,
    address_of,
    decided,
    is_compiled_region,
    is_recomputed,
    operator_name,
    saved_by,
    saved_option,
)
from .trace import Trace

# Operators that hand on the elements of a tensor in their order.
AROUND = names_of("Alias Clone ReshapeAlias Squeeze ToCopy UnsafeView Unsqueeze View")

# The names under which operators save the input of a layer.
SAVED_INPUTS = {"Addmm": "mat1", "Mm": "self", "PreluKernel": "self", "Embedding": "indices", "EmbeddingBag": "indices"}


def run_otherwise(traced: Trace) -> set[int]:
    """Numbers of the calls of which the graph does not tell that their rules hold."""
    leaves = list(traced.leaves.values())
    return {
        number
        for number, call in enumerate(traced.calls)
        if call.rule.operators
        and not is_compiled_region(traced.nodes[number])  # into which nobody sees
        and not _Reading(traced, number, leaves).holds()
    }


class _Reading:
    """Reads the nodes of a call from its output to its inputs.

    Args:
        traced: the graph.
        number: of the call.
        leaves: of the graph, in the order they were met.
    """

    def __init__(self, traced: Trace, number: int, leaves: Sequence[Tensor]) -> None:
        self.traced, self.call = traced, traced.calls[number]
        self.start = traced.positions[traced.nodes[number]]
        self.rule, self.parameters = self.call.rule, self.call.parameters
        self.ends = {traced.positions[made] for made in self.call.input_nodes if made in traced.positions}
        self.leaves = leaves
        self.met: list[str] = []  # names of the parameters that were read
        self.core: int | None = None  # the node that reads the layer's input

    def holds(self) -> bool:
        """Whether the call's rule does."""
        if self.rule.whole_call:
            return self._reads_whole()
        if self.call.output_nr or not self._made(self.start) or sorted(self.met) != sorted(self.parameters):
            return False
        try:
            return self.core is None or self._described(self.core)
        except RuntimeError:  # the graph was used up: what was saved is gone, which others tell the user of
            return True

    def _made(self, position: int) -> bool:
        """Whether a node made the output of the layer, or a part of it, by the rule's operators."""
        traced = self.traced
        while operator_name(traced.order[position]) in AROUND:
            (child,) = traced.children[position]
            if child is None or child < 0 or position in self.ends:
                return False
            position = child
        node = traced.order[position]
        name, children = operator_name(node), traced.children[position]
        roles = self.rule.operators.get(name)
        if roles is None or any(saved_option(node, factor) not in (None, 1) for factor in ("alpha", "beta")):
            return False
        if OUTPUT not in roles:
            self.core = position
        for slot, child in enumerate(children):
            if child is None:
                continue
            role = roles[slot] if slot < len(roles) else None
            if role is None:
                return False
            if role == OUTPUT:
                fits = child >= 0 and self._made(child)
            else:
                fits = self._is_input(child) if role == INPUT else self._is_parameter(child, role)
            if not fits:
                return False
        return True

    def _is_input(self, child: int) -> bool:
        """Whether what is behind an input of a node is the layer's input, but for operators that may lie between."""
        return self._leads_to_inputs([child], AROUND | self.rule.on_inputs) is not None

    def _leads_to_inputs(self, pending: list[int], within: Collection[str]) -> set[int] | None:
        """The nodes from some to the layer's inputs, if these are all they lead to by such operators; else None."""
        own = {id(parameter) for parameter in self.parameters.values()}
        visited: set[int] = set()
        while pending:
            position = pending.pop()
            if position < 0:
                if id(self.leaves[-2 - position]) in own:
                    return None
            elif position not in self.ends and position not in visited:
                visited.add(position)
                if operator_name(self.traced.order[position]) not in within:
                    return None
                pending += [child for child in self.traced.children[position] if child is not None]
        return visited

    def _is_parameter(self, child: int, role: str) -> bool:
        """Whether what is behind an input of a node is a trained parameter itself, or its transpose."""
        name, turned = role.removesuffix(TURNED), role.endswith(TURNED)
        while child >= 0:
            operator = operator_name(self.traced.order[child])
            if operator == "T":
                turned = not turned
            elif operator != "ToCopy" and operator not in self.rule.on_parameters:
                return False
            (below,) = self.traced.children[child]
            if below is None:
                return False
            child = below
        self.met.append(name)
        return not turned and self.parameters.get(name) is self.leaves[-2 - child]

    def _described(self, core: int) -> bool:
        """Whether the operator was run with the options, the mode and the input that the rule reads."""
        node, call = self.traced.order[core], self.call
        name = operator_name(node)
        if name in BATCH_NORMS and not self.rule.always and saved_option(node, "training") not in (None, call.couples):
            return False
        activations = call.kept()
        inputs = activations[0] if isinstance(activations, tuple) else activations
        if isinstance(inputs, Tensor) and inputs.is_nested:
            return True  # whose shape is not told in numbers
        if not self.rule.describes(call.as_called, node, activations, tuple(call.shape)):
            return False
        roles = self.rule.operators[name]
        followed = INPUT in roles and self.traced.children[core][roles.index(INPUT)] is not None
        return followed or isinstance(activations, tuple) or _read(node, name, inputs)

    def _reads_whole(self) -> bool:
        """Whether a whole call consists of the rule's operators, and those next to parameters change no numbers."""
        starts = [child for child in self.traced.children[self.start] if child is not None]
        parts, leaves = set(), {id(parameter): name for name, parameter in self.parameters.items()}
        pending, met = starts, set()
        while pending:
            position = pending.pop()
            if position in self.ends or position in parts or position < 0:
                continue
            parts.add(position)
            name = operator_name(self.traced.order[position])
            if name not in self.rule.operators:
                return False
            for child in self.traced.children[position]:
                if child is None:
                    continue
                if child < 0 and id(self.leaves[-2 - child]) in leaves:
                    if name not in self.rule.on_parameters:
                        return False
                    met.add(leaves[id(self.leaves[-2 - child])])
                pending.append(child)
        return met == set(self.parameters)


def _read(node: Any, name: str, inputs: Tensor | None) -> bool:
    """Whether what a node saved of an input without a gradient is what the layer was called with."""
    saved = None if inputs is None else saved_by(node, SAVED_INPUTS.get(name, "input"))
    if not isinstance(saved, Tensor) or inputs is None or {saved.layout, inputs.layout} != {torch.strided}:
        return True
    if saved.numel() != inputs.numel():
        return True  # it was padded
    if (address_of(saved), saved.storage_offset()) == (address_of(inputs), inputs.storage_offset()):
        return True
    # A convolution whose padding is not of zeros copies its input even where there is nothing to pad.
    copies = "onvolution" in name or is_recomputed(node)
    if inputs.dtype == saved.dtype and inputs.is_contiguous() and not copies:
        return False  # torch had no reason to copy it
    return decided((saved.reshape(inputs.shape) == inputs.to(saved.dtype)).all())
