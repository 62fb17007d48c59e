"""What a graph tells by itself: what lies inside of captured calls, and what is computed from parameters alone.

The nodes of a graph hold rows of the examples, or tensors that all examples share: the transpose of a weight, a weight
under ``weight_norm``, an embedded position table. Which it is is measured (:mod:`engm.graph.owners`), but for nodes
that read nothing but trained parameters, which are shared whatever a measurement says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property
from math import prod

from torch import nn

from ..capture.calls import Call, Wrapper
from ..rules.same_tensor import rearranges
from ..torch_internals import address_of, is_compiled_region, is_python_function, operator_name
from .plan import Source
from .trace import Trace

# Operators that may read data which the graph does not show, although each of their inputs requires a gradient.
INDEXING = frozenset(
    [
        "Expand",
        "Repeat",
        "RepeatInterleave",
        "Index",
        "IndexSelect",
        "Gather",
        "Take",
        "Embedding",
        "Where",
        "MaskedFill",
        "MaskedSelect",
        "Scatter",
        "IndexPut",
        "IndexAdd",
    ]
)


class Structure:
    """What the nodes of a graph are, as far as the graph alone tells; nodes are named by their positions.

    Args:
        traced: the graph.
        aside: numbers of the calls that do not account for their parameters: operators do.
        disbelieved: those of them that ran something else than the layer's type says.

    Attributes:
        calls_at: numbers of the calls whose outputs a node made.
        interiors: for every call that is not aside, the nodes from its output to its inputs, output included.
        inner: the nodes inside of calls, without those that made the outputs of calls.
        pure: for every node, whether it is computed from trained parameters and from nothing else.
        trains: for every node, whether gradients go on from it to a trained parameter.
    """

    def __init__(self, traced: Trace, aside: Collection[int], disbelieved: Collection[int] = ()) -> None:
        self.traced, self.aside, self.disbelieved = traced, aside, disbelieved
        self.calls_at: dict[int, list[int]] = {}
        for number, node in enumerate(traced.nodes):
            self.calls_at.setdefault(traced.positions[node], []).append(number)
        leaves = list(traced.leaves.values())
        trained = {id(parameter) for _, parameter in traced.trained}
        self._trained = [id(leaf) in trained for leaf in leaves]
        self._leaves = leaves
        self.pure: list[bool] = []
        last = len(traced.order) - 1
        for position, children in enumerate(traced.children):
            of_parameters = [self._is_pure(child) for child in children]
            self.pure.append(
                position != last and bool(children) and all(of_parameters) and not reads_more(traced.order[position])
            )
        self.trains = self.training(range(last + 1))
        self.interiors = [self._interior(number) for number in range(len(traced.calls))]
        self._around: dict[int, list[int]] = {}
        for number, within in enumerate(self.interiors):
            for position in within:
                self._around.setdefault(position, []).append(number)
        self._otherwise: dict[int, set[int]] = {}
        self.inner = set().union(*self.interiors) - {
            position for position, found in self.calls_at.items() if any(self.interiors[k] for k in found)
        }

    def _is_pure(self, child: int | None) -> bool:
        if child is None:
            return False
        return self.pure[child] if child >= 0 else self._trained[-2 - child] and not self.is_input(child)

    def trained_behind(self, child: int | None) -> bool:
        """Whether what is behind an input of a node is a trained parameter, or leads to one."""
        if child is None:
            return False
        return self.trains[child] if child >= 0 else self._trained[-2 - child]

    def training(self, within: Collection[int]) -> list[bool]:
        """For every node, whether gradients go on from it to a trained parameter by nodes ``within`` some alone."""
        found: list[bool] = []
        for position, children in enumerate(self.traced.children):
            goes_on = (found[c] if c >= 0 else self.trained_behind(c) for c in children if c is not None)
            found.append(position in within and any(goes_on))
        return found

    def is_input(self, child: int) -> bool:
        """Whether a leaf behind an input of a node is trained and no parameter: an input of the network."""
        return self._trained[-2 - child] and not isinstance(self._leaves[-2 - child], nn.Parameter)

    @cached_property
    def no_inputs(self) -> set[int]:
        """The numbers of all leaves but those that are trained and no parameters."""
        return {leaf for leaf in (-2 - k for k in range(len(self._leaves))) if not self.is_input(leaf)}

    def _interior(self, number: int) -> set[int]:
        """The nodes between the output of a call and its inputs and parameters."""
        traced, call = self.traced, self.traced.calls[number]
        node = traced.nodes[number]
        within: set[int] = set()
        if number in self.aside or self.pure[traced.positions[node]]:
            return within
        ends = {traced.positions[made] for made in call.input_nodes if made in traced.positions}
        called = set(traced.places)
        pending = [traced.positions[node]]
        while pending:
            position = pending.pop()
            if position in within:
                continue
            within.add(position)
            if traced.order[position] in traced.tokens and not call.rule.whole_call:
                continue  # the whole call is one node
            for child in traced.children[position]:
                if child is None or child < 0 or child in ends:
                    continue
                if call.rule.generic or child not in called:
                    pending.append(child)
        # What a layer reads besides, a weight that a network computed of the examples, say, is not the layer's own.
        own = {id(parameter) for parameter in call.parameters.values()}
        leading: set[int] = set()
        for position in sorted(within):
            if any(
                child is not None
                and (child in leading or child in ends or (child < 0 and self._may_be_read(child, own)))
                for child in traced.children[position]
            ):
                leading.add(position)
        return leading | {traced.positions[node]}

    def _may_be_read(self, child: int, own: Collection[int]) -> bool:
        """Whether a leaf is one of a call's own parameters, or no parameter."""
        leaf = self._leaves[-2 - child]
        return id(leaf) in own or not isinstance(leaf, nn.Parameter)

    @cached_property
    def looked_at(self) -> set[int]:
        """The nodes whose outputs are of interest: not those inside of calls, nor those of parameters alone."""
        return {position for position, pure in enumerate(self.pure) if not pure} - self.inner

    @cached_property
    def parents(self) -> list[list[int]]:
        """For every node, those that pass gradients to it."""
        found: list[list[int]] = [[] for _ in self.traced.order]
        for position, children in enumerate(self.traced.children):
            for child in children:
                if child is not None and child >= 0:
                    found[child].append(position)
        return found

    def below(self, positions: Iterable[int], within: Collection[int] | None = None) -> set[int]:
        """These nodes and all that they pass gradients to, as far as that lies ``within`` some nodes."""
        found: set[int] = set()
        pending = list(positions)
        while pending:
            position = pending.pop()
            if position not in found and (within is None or position in within):
                found.add(position)
                pending += [c for c in self.traced.children[position] if c is not None and c >= 0]
        return found

    def sources(self, child: int, within: Collection[int]) -> list[Source]:
        """Trained parameters that what is behind an input is computed from, by way of nodes ``within`` some alone."""
        found: dict[int, Source] = {}
        rearranged, pending, visited = True, [child], set()
        while pending:
            current = pending.pop()
            if current < 0:
                leaf = self._leaves[-2 - current]
                if self._trained[-2 - current]:
                    found[id(leaf)] = Source(id(leaf), rearranged)
            elif current not in visited and current in within:
                visited.add(current)
                inner = [c for c in self.traced.children[current] if c is not None]
                rearranged = rearranged and len(inner) == 1 and rearranges(self.traced.order[current])
                pending += inner
        return list(found.values())

    def covered(self, position: int, slot: int, within: Collection[int]) -> bool | None:
        """Whether the call that an edge lies in accounts for what enters by the edge, from ``within`` some nodes.

        None: the edge lies inside of a call that gradients also reach otherwise than by the call's output, so that it
        accounts for a part alone.
        """
        child = self.traced.children[position][slot]
        assert child is not None
        entering = {source.parameter for source in self.sources(child, within)}
        for number in self.calls_around(position):
            own = {id(p) for p in self.traced.calls[number].parameters.values()}
            if entering & own:
                return True if entering <= own and position not in self._reached_otherwise(number) else None
        return False

    def _reached_otherwise(self, number: int) -> set[int]:
        """Nodes inside a call that gradients reach by another way than through the call's output."""
        if number not in self._otherwise:
            within, output = self.interiors[number], self.traced.positions[self.traced.nodes[number]]
            outside = [
                position
                for position in within
                if position != output
                and not self.pure[position]
                and any(parent not in within for parent in self.parents[position])
            ]
            self._otherwise[number] = self.below(outside, within) if outside else set()
        return self._otherwise[number]

    def called_batch_norm(self, position: int) -> bool:
        """Whether a node made the output of a call that is known to take statistics from the batch.

        A batch norm that made the output of another call, such as one of a subclass with a forward pass of its own, is
        known of by the node alone.
        """
        called = (k for k in self.calls_at.get(position, ()) if k not in self.disbelieved)
        return any(self.traced.calls[number].couples for number in called)

    def calls_around(self, position: int) -> list[int]:
        """Numbers of the calls that a node lies inside of, or made the output of."""
        return self._around.get(position, [])

    def reads_data(
        self,
        child: int,
        owner: Wrapper,
        n: int,
        apart: Collection[int] = (),
        within: Collection[int] | None = None,
    ) -> int | None:
        """The call nearest to the losses by which what is behind an input of a node reads the examples.

        What is computed from parameters, buffers and indices of the network's own reads none. Nor does a call whose
        rows cannot be the examples (:meth:`_may_be_examples`), unless it is one of those (``apart``) of which some rows
        are of one example alone. Only what is ``within`` some nodes counts. Returns the number of the call, -1 for an
        input that requires a gradient, None if nothing of the kind is there.
        """
        if child < 0:
            return -1 if self._is_data(child) else None
        below = self.below([child], within)
        numbers = sorted(k for p in below for k in self.calls_at.get(p, ()) if not self.pure[p])
        reading = [
            k
            for k in numbers
            if self.traced.calls[k].input_storages
            and (k in apart or self._may_be_examples(self.traced.calls[k], n))
            and self._call_reads_data(k, owner)
        ]
        if reading:
            # The nearest call that reads them is the first on the way; it may read what others computed.
            return next(k for k in numbers if k in reading or self._leads_to(k, reading))
        leaves = (c for p in below for c in self.traced.children[p] if c is not None and c < 0)
        if not any(map(self._is_data, leaves)):
            return None
        return numbers[0] if numbers else -1

    def _is_data(self, child: int) -> bool:
        """Whether a leaf holds the examples: the network was given it, or norms of its gradients are wanted.

        One of the user's own that is no parameter may be what perturbs a weight, or a rate that is learned. No gradient
        of a parameter goes through it, so that whatever it holds no example influences another by it.
        """
        leaf = self._leaves[-2 - child]
        return not isinstance(leaf, nn.Parameter) and (self.is_input(child) or address_of(leaf) in self._given)

    @cached_property
    def _given(self) -> frozenset[int]:
        """The addresses of the memory of all tensors that the network was called with."""
        return frozenset().union(*[capture.input_storages for capture in self.traced.own_captures])

    def _leads_to(self, number: int, reading: Collection[int]) -> bool:
        below = self.below([self.traced.positions[self.traced.nodes[number]]])
        return any(self.traced.positions[self.traced.nodes[k]] in below for k in reading)

    @staticmethod
    def _may_be_examples(call: Call, n: int) -> bool:
        """Whether the rows of a call with inputs that no gradient goes to may be those of the examples.

        They may if there are as many, or a multiple. What the network made itself has to be as many rows, or as many
        numbers, as something that it was given, since it may be the places of a grid.
        """
        given = call.capture
        if call.batch % n or call.input_storages & given.input_storages or not given.input_shapes:
            return call.batch % n == 0
        return any(shape[:1] == (call.batch,) or prod(shape) in call.input_sizes for shape in given.input_shapes)

    def _call_reads_data(self, number: int, owner: Wrapper) -> bool:
        """Whether the inputs of a call that no gradient goes to, of which there are some, are about the examples."""
        call = self.traced.calls[number]
        if call.input_storages & call.capture.input_storages:
            return True
        own = {address_of(tensor) for tensor in owner.buffers()} | {address_of(p) for _, p in self.traced.trained}
        return not (call.input_is_index or call.input_storages <= own)


def reads_more(node: object) -> bool:
    """Whether an operator may read data besides its differentiable inputs."""
    own = is_python_function(node) and operator_name(node) != "Tap"  # a user's own function
    return own or is_compiled_region(node) or operator_name(node) in INDEXING
