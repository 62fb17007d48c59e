"""A recorded step as a straight-line program: how it is traced, cleaned and run.

The engine runs as it is while torch's own tracer notes every operator. What comes out has no hook, rule or plan in it:
it reads its inputs, and the tensors that were there before it was recorded (parameters, buffers) by identity.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .._C import StraightLine
from ..torch_internals import (
    Memory,
    address_of,
    is_of_others,
    is_operator,
    is_wrapped_number,
    moved_statistics,
    quick_descriptions,
    schema_of,
    without_autocast,
    written_operands,
)
from .agreement import Tolerance
from .refusals import UnrecordableError

Function = Callable[..., list[Tensor]]
COPIES = frozenset([torch.ops.aten.detach.default, torch.ops.aten.alias.default])  # nothing is left to detach from


class Runnable(Protocol):
    """What does a recorded step again: its program as it is, or what a backend has made of it.

    Attributes:
        length: number of operators that were recorded.
    """

    length: int

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs, which are as many and as large as those that were recorded."""

    def reads(self, tensor: Tensor) -> bool:
        """Whether the tensor is one of those from before the recording that are read."""

    def holds(self) -> bool:
        """Whether the memory of those tensors is where it has to be."""


class Backend(Protocol):
    """How recorded steps are run.

    Attributes:
        name: the name that :func:`engm.record` knows the backend by.
        fuses: whether it runs kernels of its own, whose numbers are the program's but for rounding.
    """

    name: str
    fuses: bool

    def check(self, devices: set[torch.device]) -> None:
        """Refuses models that it cannot run.

        Args:
            devices: where the parameters are.

        Raises:
            ValueError: the model is in the wrong place.
        """

    def made(self, program: Program, module: fx.GraphModule, inputs: Sequence[Tensor]) -> Runnable:
        """What runs from now on in the program's place; the state of the model and its inputs may change meanwhile.

        Args:
            program: the program as it is.
            module: the operators that it was made of, which may be changed.
            inputs: an example.

        Raises:
            UnrecordableError: this program cannot be run in this way.
        """


class Replay:
    """The program runs as it is."""

    name = "replay"
    fuses = False

    def check(self, devices: set[torch.device]) -> None:
        """Nothing is refused."""

    def made(self, program: Program, module: fx.GraphModule, inputs: Sequence[Tensor]) -> Runnable:
        return program


class Program:
    """What a function of tensors did, to be done again for other tensors.

    Args:
        module: the recorded operators.

    Attributes:
        length: number of operators.
        tolerance: by how much two runs may differ whose kernels are rounded in other places.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        # Handed over at every call: what C++ held could not be given other numbers by torch.utils.swap_tensors.
        self._line, self._read, self.length = _straight_line(module)
        self.tolerance = Tolerance.of(module)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs, which are as many and as large as those that were recorded."""
        with without_autocast():  # the program has its casts in it
            return self._line.run([*self._read, *inputs])

    def reads(self, tensor: Tensor) -> bool:
        """Whether the tensor is one of those from before the recording that the program reads."""
        return any(tensor is known for known in self._read)

    def tensors(self) -> list[Tensor]:
        """The tensors from before the recording that the program reads."""
        return self._read

    def holds(self) -> bool:
        """Always: the program reads tensors wherever their memory is."""
        return True


def _straight_line(module: fx.GraphModule) -> tuple[StraightLine, list[Tensor], int]:
    """The operators of a recording as a program that runs without Python, its first inputs, and how many there are.

    The first inputs are the tensors from before the recording.

    Raises:
        UnrecordableError: something in it is no operator of tensors.
    """
    nodes: list[Any] = list(module.graph.nodes)
    place: dict[fx.Node, int] = {}
    owned: dict[fx.Node, list[int]] = {}  # by the node that reads them last, the places that are free afterwards
    inputs, calls = [], []
    read: dict[int, tuple[int, Tensor]] = {}  # by identity, tensors from before the recording, with their places
    objects: dict[fx.Node, Any] = {}  # generators of random numbers
    outputs: list[int] = []
    count = 0
    for node in nodes:
        first, width = count, 1
        if node.op == "placeholder":
            inputs.append(count)
        elif node.op == "get_attr":
            found = attribute_of(module, str(node.target))
            if isinstance(found, Tensor):
                first, _ = read.setdefault(id(found), (count, found))
                width = int(first == count)
                place[node] = first
            else:
                objects[node], width = found, 0
        elif node.op == "output":
            outputs, width = [place[result] for result in node.args[0]], 0
        elif node.target is operator.getitem:
            place[node], width = place[node.args[0]] + node.args[1], 0
        elif is_operator(node.target):
            width = _width(node)
            calls.append((node, first, width))
        else:
            raise UnrecordableError(f"'{node.target}' is no operator of tensors", for_good=True)
        if width:
            place[node] = first
            count += width
    when = {node: number for number, node in enumerate(nodes)}
    for node, first, width in calls:
        ends: dict[int, Any] = dict.fromkeys(range(first, first + width), node)
        for name in () if not width else (node, *(user for user in node.users if user.target is operator.getitem)):
            readers = [user for user in name.users if user.target is not operator.getitem]
            ends[place[name]] = max([ends[place[name]], *readers], key=when.__getitem__)
        for free, end in ends.items():
            owned.setdefault(end, []).append(free)
    tensors = [tensor for _, tensor in read.values()]
    line = StraightLine(count, [*(known for known, _ in read.values()), *inputs], outputs)
    for node, first, width in calls:
        schema = schema_of(node.target)
        line.add(schema.name, schema.overload_name, _arguments(node, place, objects), first, width, owned.get(node, []))
    return line, tensors, len(calls)


def attribute_of(module: fx.GraphModule, name: str) -> Any:
    """What a node that gets an attribute gets."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _width(node: fx.Node) -> int:
    """How many values an operator returns; of a list of tensors as many as are read."""
    returns = schema_of(node.target).returns
    if len(returns) == 1 and returns[0].type.kind() == "ListType":
        picked: list[Any] = [user.args[1] for user in node.users]
        if any(user.target is not operator.getitem for user in node.users):
            raise UnrecordableError(f"the tensors of '{node.target}' are handed on as a list", for_good=True)
        return int(max(picked, default=-1)) + 1
    return len(returns)


def _arguments(node: fx.Node, place: dict[fx.Node, int], objects: dict[fx.Node, Any]) -> list[Any]:
    """The arguments of an operator in the order of its schema, as ``StraightLine.add`` takes them."""

    def described(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return [objects[value]] if value in objects else (place[value],)
        if isinstance(value, list | tuple) and any(isinstance(part, fx.Node) for part in value):
            return ([-1 if part is None else place[part] for part in value],)
        return [value]

    found = []
    for number, argument in enumerate(schema_of(node.target).arguments):
        if number < len(node.args):
            found.append(described(node.args[number]))
        else:
            found.append(described(node.kwargs[argument.name]) if argument.name in node.kwargs else None)
    return found


def recorded(function: Function, inputs: Sequence[Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    """The operators that ``function(*inputs)`` runs, and what it returns; it is run once, on these very inputs.

    Raises:
        Exception: whatever the function raises; also where the host reads a value that comes of the inputs.
    """
    outputs: list[Tensor] = []
    # Tensors of their own: the batch may have the same one twice, or one that is also read from elsewhere.
    inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]

    def noted(*tensors: Tensor) -> list[Tensor]:
        outputs[:] = function(*tensors)
        return outputs

    with quick_descriptions():
        module = make_fx(noted, tracing_mode="real")(*inputs)
    return module, outputs


def cleaned(module: fx.GraphModule) -> fx.GraphModule:
    """The operators of a recording without copies that only autograd needs, and without what nobody reads."""
    for node in list(module.graph.nodes):
        if node.target in COPIES:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code(is_kept)
    module.recompile()
    return module


def watch_any(module: fx.GraphModule, first: int, flags: Sequence[int]) -> bool:
    """Leave nothing of the outputs from number ``first`` on but one, that tells whether any of the flags is true.

    Args:
        module: the recorded operators.
        first: the number of the first output that is not left.
        flags: the numbers of outputs that are true or false, 0-dimensional.

    Returns:
        Whether there is such an output.
    """
    output = output_of(module)
    results: Any = output.args[0]
    watched = [results[number] for number in flags]
    with module.graph.inserting_before(output):
        if watched:
            stacked = module.graph.call_function(torch.ops.aten.stack.default, (watched,))
            watched = [module.graph.call_function(torch.ops.aten.any.default, (stacked,))]
    output.args = ([*results[:first], *watched],)
    return bool(watched)


def is_kept(node: fx.Node) -> bool:
    """Whether a node matters even if nobody reads what it returns: it writes into a tensor, or draws at random."""
    kept = node.op in ("placeholder", "output") or is_random(node) or writes(node)
    return kept or bool(moved_statistics(node.target, node.args, node.kwargs))


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers: attention is marked so too, and draws where it drops out."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    arguments = schema_of(node.target).arguments
    given = dict(zip([argument.name for argument in arguments], node.args, strict=False)) | node.kwargs
    defaults = {argument.name: argument.default_value for argument in arguments}
    return given.get("dropout_p", defaults.get("dropout_p")) != 0


def writes(node: fx.Node) -> bool:
    """Whether a node writes into a tensor that it is given."""
    schema = schema_of(node.target)
    return schema is not None and bool(schema.is_mutable)


def hang_on_data(module: fx.GraphModule, first: int, data: int) -> bool:
    """Whether any of the outputs from number ``first`` on comes of the first ``data`` inputs, or of random numbers.

    The other inputs, and what was there before, are no data.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    random = [node for node in module.graph.nodes if is_random(node)]
    return any(_come_of([*inputs[:data], *random], module)[first:])


def hang_on_what_was_there(module: fx.GraphModule, data: int) -> list[bool]:
    """By output, whether it comes of inputs after the first ``data`` ones or of tensors from before the recording.

    Numbers that the code makes tensors of (``torch.tensor``) are the same at every step.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    there = [node for node in module.graph.nodes if node.op == "get_attr" and not _is_of_code(node)]
    return _come_of([*inputs[data:], *there], module)


def unknown_tensor(module: fx.GraphModule, known: Sequence[Tensor], inputs: Sequence[Tensor]) -> str | None:
    """What a recording reads as a constant though nobody knows whether it is the same at the next step, in words.

    Tensors from before the recording are read anew by a program, in the place of views of the same numbers that a
    tracer takes for others. Any other tensor that a tracer takes for a constant was made within the step where the
    tracer does not look, of the batch perhaps. Numbers of the code are the same at every step, and so are those in
    memory that is not torch's but NumPy's, say, unless it is that of the inputs.

    Args:
        module: the recorded operators; they read the known tensors themselves from now on.
        known: the tensors from before the recording.
        inputs: of the program.

    Returns:
        The first tensor that is not known, with the operator that reads it; None where there is none.
    """
    there = {id(tensor) for tensor in known}
    whole = {_lies(tensor): tensor for tensor in reversed(known)}
    old, given = Memory(), Memory()
    for tensor in known:
        old.add(tensor)
    for tensor in inputs:
        given.add(tensor)
    for node in module.graph.nodes:
        found = attribute_of(module, str(node.target)) if node.op == "get_attr" and node.users else None
        if not isinstance(found, Tensor) or id(found) in there or _is_of_code(node):
            continue
        if is_wrapped_number(found):
            continue
        if found not in given and _lies(found) in whole:
            setattr(module, str(node.target), whole[_lies(found)])
        elif found in given or not (found in old or is_of_others(found)):
            reader = next(iter(node.users)).target
            return f"{reader} reads a {type(found).__name__} of shape {list(found.shape)}"
    return None


def _lies(tensor: Tensor) -> Hashable:
    """Where the numbers of a tensor are, and how they are read; who it is where nobody can tell."""
    address = address_of(tensor) if tensor.layout == torch.strided and not tensor.is_nested else 0
    if not address:
        return id(tensor)
    return address, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg()


def _is_of_code(node: fx.Node) -> bool:
    """Whether a node gets numbers that the code has made a tensor of: all that is ever read is a copy."""
    copies = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default)
    return all(user.target in copies for user in node.users)


def _come_of(sources: Sequence[fx.Node], module: fx.GraphModule) -> list[bool]:
    """By output, whether it comes of any of these nodes; what is written into a view is in all views of the memory."""
    memory = memory_of(module)
    known, moved = set(sources), set()
    for node in module.graph.nodes:
        if node in known or any(memory[source] in moved for source in node.all_input_nodes):
            moved.add(memory[node])
            moved.update(memory[into] for into in written_by(node))
    results: Any = output_of(module).args[0]
    return [isinstance(result, fx.Node) and memory[result] in moved for result in results]


def output_of(module: fx.GraphModule) -> fx.Node:
    """The node that returns what a recording returns."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    return output


def memory_of(module: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """By every node the node that the memory of its result is of: itself, unless it returns what it was given.

    Of tensors from before the recording it is the first node that gets one with that memory.
    """
    memory: dict[fx.Node, fx.Node] = {}
    first: dict[int, fx.Node] = {}
    for node in module.graph.nodes:
        given = [*written_by(node), *node.all_input_nodes] if _returns_memory(node) else []
        memory[node] = memory[given[0]] if given else node
        found = attribute_of(module, str(node.target)) if node.op == "get_attr" else None
        address = address_of(found) if isinstance(found, Tensor) and found.layout == torch.strided else 0
        if address:
            memory[node] = first.setdefault(address, node)
    return memory


def _returns_memory(node: fx.Node) -> bool:
    """Whether a node returns memory of an operand: a view, or what it has written into."""
    schema = schema_of(node.target)
    return schema is not None and bool(schema.returns) and schema.returns[0].alias_info is not None


def written_by(node: fx.Node) -> list[fx.Node]:
    """What a node writes into."""
    return written_operands(node.target, node.args, node.kwargs) if writes(node) else []
