"""Planning: can the engine see the per-example gradients behind these losses whole, and where do the examples lie?

The question is asked once for every structure of a graph (which layers were called, in which order and mode), because a
graph of the same structure has the same answer: a :class:`engm.graph.plan.Plan`. Half of the losses, drawn by a fixed
seed, are backpropagated with frozen statistics and without weight gradients. Every row of the other half must then have
a gradient of exactly zero, which finds what mixes examples, and tells in which rows of a tensor an example lies where
the shape leaves that open. Where that leaves several layouts the other half of the losses decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.calls import Wrapper
from ..rules.entries import enters_by_broadcast
from ..terms.layout import Layout
from ..torch_internals import is_compiled_region, leaf_of, node_name, output_shape, own_parameters
from .influence import Look
from .node_kinds import Choices, Kind, Structure, likely_batch, undecided_calls
from .plan import Plan
from .trace import Trace


def signature_of(traced: Trace, n: int, together: bool = False) -> tuple[Any, ...]:
    """What a plan depends on: the nodes and leaves in order, the calls, their modes, and rows an example.

    With ``together`` several processes look at once, each at its own batch; one of one example is as good as any.
    """
    kinds = hash(tuple(map(type, traced.order)))
    calls = tuple((id(call.module), call.couples, len(call.parameters), divmod(call.batch, n)) for call in traced.calls)
    leaves = tuple(  # parameters are known by identity, inputs, which are new at every step, by what they look like
        (key, leaf.shape) if isinstance(leaf, nn.Parameter) else (leaf.dim(), leaf.shape[:1] == (n,))
        for key, leaf in traced.leaves.items()
    )
    return (n > 1 or together, len(traced.order), kinds, leaves, calls)


def make_plan(model: Wrapper, traced: Trace, losses: Tensor) -> tuple[Plan, bool]:
    """The plan of a graph, and whether it will do for every graph of the same structure.

    With ``model.strict`` it is checked on gradients; without, what shapes leave open is taken to be as it usually is.

    Raises:
        RuntimeError: something mixes the examples, or a parameter is used where its per-example gradients cannot be
            told; names the layer or the parameter, and says what to do.
    """
    refuse_hidden_layers(traced)
    check_parameters(traced)
    return _Search(model, traced, losses).plan()


def set_aside(traced: Trace, choices: Choices) -> dict[int, list[Layout]]:
    """Take calls of the generic rule for calls that see no batch: operators account for what happens inside.

    That is cheaper than to run a module again, and goes where a module draws random numbers. Returns the layouts that
    those calls may have, by number.
    """
    found = {}
    for number, call in enumerate(traced.calls):
        if call.rule.generic and choices.calls[number]:
            found[number], choices.calls[number] = choices.calls[number], []
    return found


class _Search:
    """Finds the choices under which every example's gradient lies in its own rows."""

    def __init__(self, model: Wrapper, traced: Trace, losses: Tensor) -> None:
        self.model, self.traced, self.losses = model, traced, losses
        self.n = losses.shape[0]
        self.names = {id(parameter): name for name, parameter in traced.trained}
        self.choices = Choices(undecided_calls(traced, self.n, model.views))
        self.aside = set_aside(traced, self.choices)
        self.together = model.shard_group is not None  # every pass is of all processes, whatever their data
        self.sure = True

    def plan(self) -> tuple[Plan, bool]:
        self._check_batch()
        probe = self.model.strict and (self.n > 1 or self.together)
        while True:
            structure = self._structure()
            if probe:
                if self._probe(structure):
                    continue
            else:
                for position in structure.undecided():
                    self.choices.batch[position] = likely_batch(structure, position)
                    structure = self._structure()
            structure = self._structure()
            if not self._bring_in(structure):
                break
        self._check_entries(structure)
        if probe and not self.together:
            self._check_order(structure)
        return structure.plan(), self.sure

    def _check_order(self, structure: Structure) -> None:
        """Every loss must be of its own rows in the calls nearest to the losses.

        One draw of half of the losses may hold two that stand in each other's place. Here each two are told apart, by
        the digits of their numbers; a pass costs little, as it ends at those calls.
        """
        outermost, seen, pending = [], set(), [self.traced.order[-1]]
        while pending:
            node = pending.pop()
            if node is None or node in seen or leaf_of(node) is not None:
                continue
            seen.add(node)
            here = [k for k, other in enumerate(self.traced.nodes) if other is node and self.choices.calls[k]]
            outermost += here
            pending += [] if here else [child for child, _ in node.next_functions]
        calls, positions = self.traced.calls, self.traced.positions
        edges = [self.traced.edge(positions[self.traced.nodes[k]], calls[k].output_nr) for k in outermost]
        numbers = torch.arange(self.n, device=self.losses.device)
        for digit in range((self.n - 1).bit_length() if edges else 0):
            for active in ((numbers >> digit) % 2 == side for side in (0, 1)):
                look = Look(self.traced, self.losses, active, structure, (), edges)
                look.run()
                mixed = [k for k in outermost if self.choices.calls[k][0] not in look.calls[k]]
                if mixed:
                    raise RuntimeError(self._mixing_message(min(mixed)))

    def _bring_in(self, structure: Structure) -> bool:
        """Let calls that were set aside account for parameters that enter where no layout fits, if there are any."""
        lost = {
            source.parameter
            for position, slot in structure.entering
            if not structure.layouts(position) or self._is_region(position)
            for source in self._sources(structure, position, slot)
        }
        needed = [
            number
            for number in self.aside
            if any(id(parameter) in lost for parameter in self.traced.calls[number].parameters.values())
        ]
        for number in needed:
            self.choices.calls[number] = self.aside.pop(number)
        return bool(needed)

    def _is_region(self, position: int) -> bool:
        return is_compiled_region(self.traced.order[position])

    def _structure(self) -> Structure:
        return Structure(self.traced, self.n, self.model.views, set(self.names), self.choices)

    # -- looking at gradients ----------------------------------------------------------------------------------

    def _probe(self, structure: Structure) -> bool:
        """Decide by gradients what is undecided; returns whether a call turned out not to be of the batch."""
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.n), device="cpu")
        active = torch.zeros(self.n, dtype=torch.bool, device="cpu")
        active[order[: (self.n + 1) // 2]] = True
        active = active.to(self.losses.device)
        undecided = structure.undecided()
        wanted = sorted({*undecided, *(position for position, _ in structure.entering)})
        watched = [p for p in wanted if structure.layouts(p) and not self._is_region(p)]
        first = Look(self.traced, self.losses, active, structure, watched)
        first.run()
        silent = any(position not in first.touched for position in undecided if position in first.nodes)
        if first.open() or self.together or silent:
            first.again(~active)
        mixed = []
        own = set(map(id, self.traced.own))
        for number, call in enumerate(self.traced.calls):
            if id(call) not in own or not self.choices.calls[number]:
                continue
            if number not in first.touched_calls:
                self.sure = self.sure and self.choices.calls[number][0].plain and not self._is_table(number)
            elif first.calls[number]:
                self.choices.calls[number] = first.calls[number]
            else:
                mixed.append(number)
        self._set_apart(mixed)
        for position in watched:
            if position not in first.touched:
                self.sure = self.sure and position not in undecided and structure.layouts(position)[0].plain
            else:
                self.choices.nodes[position] = first.nodes[position]
        for position in undecided:  # where no gradient comes, as behind a gain of 0, none of the choices is wrong
            self.choices.batch[position] = position in first.touched and bool(first.nodes[position])
        return bool(mixed)

    def _set_apart(self, mixed: Sequence[int]) -> None:
        """Calls in whose rows the examples meet must compute something that all examples share.

        Raises:
            RuntimeError: one probably computes from the batch; names the one nearest to the losses.
        """
        refused = []
        for number in reversed(mixed):
            if self._is_table(number):
                self.choices.calls[number] = []
            else:
                refused.append(number)
        if refused:
            raise RuntimeError(self._mixing_message(min(refused)))

    def _is_table(self, number: int) -> bool:
        """Whether a call computes from parameters, from a buffer, or from indices that are not the user's input.

        Also where the first dimension has no room for the examples: then only the second was a guess.
        """
        call = self.traced.calls[number]
        if call.batch % self.n:
            return True
        if call.input_nodes:
            structure = self._structure()
            kinds = {structure.kinds[self.traced.positions[made]] for made in call.input_nodes}
            return kinds <= {Kind.SHARED, Kind.UNDECIDED}
        buffers = {buffer.untyped_storage().data_ptr() for buffer in self.model.buffers()}
        own = call.input_is_index and not call.input_storages & call.capture.input_storages
        return own or call.input_storages <= buffers

    # -- checks ------------------------------------------------------------------------------------------------

    def _check_batch(self) -> None:
        """The forward pass must have been of as many rows as there are losses (times the announced views)."""
        for capture in self.traced.own_captures:
            shape = capture.input_shape
            if len(shape) < 2 or self.n in shape[:2]:
                continue
            rows = shape[0]
            if rows != self.n * self.model.views and rows % self.n == 0 and rows > self.n:
                raise RuntimeError(self._wrong_rows(rows, "the input of the model", shape))

    def _check_entries(self, structure: Structure) -> None:
        for number, operator in structure.broken.items():
            own = self.traced.calls[number].parameters.values()
            shown = sorted(f"'{self.names[id(p)]}' (by {operator})" for p in own if id(p) in self.names)
            raise RuntimeError(self._outside_message(", ".join(shown[:5])))
        regions = [edge for edge in structure.entering if self._is_region(edge[0])]
        if regions:
            lost = {self.names[source.parameter] for edge in regions for source in self._sources(structure, *edge)}
            raise RuntimeError(region_message(", ".join(f"'{name}'" for name in sorted(lost)[:5])))
        for position, slot in structure.entering:
            node = self.traced.order[position]
            child = node.next_functions[slot][0]
            possible = structure.layouts(position)
            behind = [k for k in structure.calls_behind(child) if not self.traced.calls[k].rule.generic]
            names = ", ".join(f"'{self.names[source.parameter]}'" for source in structure.sources(child)[:5])
            if not possible:
                if behind:
                    self._refuse_call(behind)
                raise RuntimeError(
                    f"engm: the losses use {names} in {node_name(node)}, whose output {output_shape(node)} does not "
                    f"hold the {self.n} examples along its first or second dimension, or mixes them. Put the "
                    "computation into a module and give it a rule with engm.register_rule, or freeze the parameter."
                )
            planned = structure.entry(position, slot, possible[0])
            if behind and self.n > 1 and not enters_by_broadcast(planned.at(self.traced, self.n)):
                self._refuse_call(behind)
        reached = {source.parameter for p, s in structure.entering for source in self._sources(structure, p, s)}
        mine = set(map(id, self.traced.own))
        for number, call in enumerate(self.traced.calls):
            if id(call) in mine and not self.choices.calls[number] and number not in self.aside:
                used = [p for p in call.parameters.values() if id(p) in self.names and id(p) in self.traced.leaves]
                unreached = [p for p in used if id(p) not in reached]
                if unreached:
                    self._refuse_call([number])

    def _sources(self, structure: Structure, position: int, slot: int) -> Sequence[Any]:
        return structure.sources(self.traced.order[position].next_functions[slot][0])

    def _refuse_call(self, numbers: Sequence[int]) -> None:
        """Raise for a call that sees the batch, but not in rows of its examples."""
        number = min(numbers)
        call = self.traced.calls[number]
        shape = call.shape
        what = f"the output of layer '{call.name}' ({type(call.module).__name__})"
        raise RuntimeError(self._wrong_rows(call.batch, what, shape))

    def _mixing_message(self, number: int) -> str:
        call = self.traced.calls[number]
        return (
            f"engm: the output of layer '{call.name}' ({type(call.module).__name__}) for some examples "
            "influences the losses of other examples, so per-example gradients are not defined there. Something "
            "between this layer and the losses mixes the batch (x - x.mean(0), a batch statistic outside "
            "nn.BatchNorm, losses in another order than the inputs, a layout whose first dimension is not the "
            "batch). Replace it, or wrap with strict=False if you know that the mixing does not matter."
        )

    def _wrong_rows(self, rows: int, what: str, shape: tuple[int, ...]) -> str:
        views = self.model.views
        message = f"engm: {what} has shape {tuple(shape)}, but there are {self.n} losses"
        if views > 1:
            message += f" and views={views}, so its first dimension must be {self.n * views}"
        message += ". Examples must lie along the first dimension, one loss each"
        if rows and rows % self.n == 0 and views == 1:
            message += (
                f"; if every example has {rows // self.n} rows, as in model(torch.cat([x, x_adv])), wrap with "
                f"GradNormModule(net, views={rows // self.n})"
            )
        return message + "."

    def _outside_message(self, shown: str) -> str:
        return (
            f"engm: the losses use {shown} outside of the layer calls that were captured, so a part of these "
            "parameters' per-example gradients cannot be seen. Call the layer itself instead of computing with what is "
            "inside it, freeze the parameter, or put the computation into a module of its own."
        )


def refuse_hidden_layers(traced: Trace) -> None:
    """No part of the graph may hide the layers inside.

    Raises:
        RuntimeError: names what hides them.
    """
    hidden = [name for name in map(node_name, traced.order) if name.startswith("CheckpointFunction")]
    if hidden:
        raise RuntimeError(
            f"engm: the losses run through {hidden[0]}, torch.utils.checkpoint with use_reentrant=True, which hides "
            "the layers inside from the graph. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )


def check_parameters(traced: Trace) -> None:
    """The graph must be of the model's own parameters. A parameter that was replaced since has a gradient of 0.

    Raises:
        RuntimeError: the forward pass ran with other tensors in the place of all of them.
    """
    if any(id(parameter) in traced.leaves for _, parameter in traced.trained):
        return
    used = [(call, key, p) for call in traced.own for key, p in call.parameters.items() if p.requires_grad]
    if not traced.trained or not used:
        return
    call, key, parameter = used[0]
    if own_parameters(call.module).get(key) is not parameter:
        name = f"{call.name}.{key}" if call.name else key
        raise RuntimeError(
            f"engm: the forward pass behind these losses ran with other tensors than the model's parameters, such as "
            f"'{name}' (torch.func.functional_call, or they were replaced since), and norms are taken over the model's "
            "own. Copy the values into them, or run the forward pass again."
        )


def region_message(shown: str) -> str:
    """What to say of parameters that a compiled region uses beside its layers."""
    return (
        f"engm: a region made by torch.compile uses {shown} outside of layer calls that were captured, so their "
        "per-example gradients cannot be seen. If the network was compiled and called before it was wrapped, call "
        "torch.compiler.reset() once. If these parameters are used directly (a class token, "
        "F.linear(x, layer.weight), a table of positions, a layer without a rule), leave that part uncompiled with "
        "torch.compiler.disable, or freeze them."
    )
