"""What keeps a recorded program from being a CUDA graph: operators at which the host waits, or works itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..torch_internals import deciding_sizes, is_operator, tensors_in
from .program import is_random, memory_of, writes, written_by

MASKED = frozenset(["index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"])  # sizes do not tell of masks
COPIES = frozenset(["_to_copy", "copy", "copy_", "copy_from"])


def obstacles(module: fx.GraphModule, device: torch.device) -> list[str]:
    """Why a program cannot be in a CUDA graph: a clause for each operator that keeps it from that, in their order.

    Args:
        module: the recorded operators.
        device: where the graph would run.
    """
    found = []
    memory = memory_of(module)
    written = {memory[into] for node in module.graph.nodes for into in written_by(node)}  # also through their views
    fixed: set[fx.Node] = set()  # numbers on the host that are the same in every replay
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if node.users and any(tensor.device != device and not is_number(tensor) for tensor in _results(node)):
                found.append("the step is given a tensor of another device: move the batch before")
            if any(overlaps(tensor) for tensor in _results(node)):
                found.append("the step is given an expanded tensor: make it contiguous")
            if node in written:
                found.append("the step writes into its inputs, of which a CUDA graph has copies: clone them first")
        elif is_operator(node.target):
            if _is_fixed(node, fixed):
                fixed.add(node)
                continue
            why = _why(node, device, fixed)
            if why is not None:
                found.append(f"'{_name(node)}' {why}")
    return found


def _why(node: fx.Node, device: torch.device, fixed: set[fx.Node]) -> str | None:
    """Why an operator cannot be in a CUDA graph; None if it can."""
    args: Any = fx.map_arg((node.args, node.kwargs), _value)
    name = _name(node).partition(".")[0]
    if torch.Tag.data_dependent_output in node.target.tags:  # type: ignore[union-attr]
        return "hands a value to the host"
    if deciding_sizes(node.target, args[0]):
        return "returns as many numbers as the data say"
    if name in MASKED and any(part.dtype in (torch.bool, torch.uint8) for part in tensors_in(args[0][1])):
        return "writes where a mask says, whose size the host reads"
    tensors = [*tensors_in(args), *_results(node)]
    if "sparse" in name or "coalesce" in name or any(tensor.layout != torch.strided for tensor in tensors):
        return "works on sparse tensors, whose sizes the host reads"
    known = [source for source in node.all_input_nodes if source not in fixed]
    given = [t for source in known for t in _results(source) if not (source.op == "placeholder" and is_number(t))]
    others = [tensor for tensor in [*given, *_results(node)] if tensor.device != device]
    copied = name in COPIES and any(source in fixed for source in node.all_input_nodes)
    if others or copied:
        other = others[0].device if others else "cpu"
        return f"works on a tensor of {other}, which is read when the graph is captured and never again"
    return None


def _is_fixed(node: fx.Node, fixed: set[fx.Node]) -> bool:
    """Whether a node returns a number on the host that is made of constants of the code alone.

    Kernels on the device take such numbers as arguments, which a CUDA graph keeps.
    """
    results = _results(node)
    if not results or any(tensor.device.type != "cpu" or tensor.dim() for tensor in results):
        return False
    if is_random(node) or writes(node) or torch.Tag.data_dependent_output in node.target.tags:  # type: ignore[union-attr]
        return False
    sources = node.all_input_nodes
    if node.target is torch.ops.aten.lift_fresh_copy.default:
        return all(source.op == "get_attr" for source in sources)
    return all(source in fixed for source in sources)


def is_number(tensor: Tensor) -> bool:
    """Whether a tensor is one number on the host, which can be an input of a graph as a number on the device."""
    return tensor.device.type == "cpu" and tensor.dim() == 0


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _results(node: fx.Node) -> list[Tensor]:
    return tensors_in(_value(node))


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").removesuffix(".default")


def overlaps(tensor: Tensor) -> bool:
    """Whether several elements of a tensor share memory, because it is expanded."""
    if tensor.layout != torch.strided:
        return False
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
