"""Backward passes that take the statistics of batch norms for constants (design section 2.5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..checks import RefusedError
from ..ops import in_type
from ..torch_internals import Node, batch_norm_inputs, batch_norm_statistics, node_name, ours, own_parameters


@dataclass(frozen=True)
class BatchNormNode:
    """One batch norm in a graph that takes its statistics from the batch.

    Attributes:
        node: its autograd node.
        gain: gives ``scale / sigma``, ``[C]``.
        slot: which input of the node is the layer's input.
        output_nr: which output of the node is the layer's output.
    """

    node: Node
    gain: Callable[[], Tensor]
    slot: int = 0
    output_nr: int = 0

    def with_constant_statistics(
        self, grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Node hook: the input's gradient becomes ``scale / sigma * gy``; None leaves the gradients as they are.

        Args:
            grad_inputs: gradients of the node's inputs, that of the layer's ``[n, C, *S]``.
            grad_outputs: gradients of its outputs, that of the layer's ``[n, C, *S]``.
        """
        if grad_inputs[self.slot] is None:
            return None
        gy = grad_outputs[self.output_nr]
        frozen = gy * self.gain().view([1, -1] + [1] * (gy.dim() - 2))
        frozen = in_type(frozen, grad_inputs[self.slot].dtype)
        return (*grad_inputs[: self.slot], frozen, *grad_inputs[self.slot + 1 :])


@contextmanager
def frozen_statistics(batch_norms: Iterable[BatchNormNode]) -> Iterator[None]:
    """While the context is open, backward passes take the statistics of these batch norms for constants."""
    handles = []
    try:
        for batch_norm in batch_norms:
            handles.append(ours(batch_norm.node.register_hook(batch_norm.with_constant_statistics)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def gain_of(module: nn.Module, rstd: Tensor) -> Tensor:
    """``scale / sigma`` of a batch norm, ``[C]``, from the reciprocal standard deviation of its call, ``[C]``."""
    weight = own_parameters(module).get("weight")
    return rstd if weight is None else rstd * weight.detach()


def gain_of_node(node: Node) -> Tensor:
    """``scale / sigma`` of the batch norm behind an autograd node, ``[C]``; no module is needed.

    Raises:
        RuntimeError: the node has let go of its statistics.
    """
    statistics = batch_norm_statistics(node)
    if statistics is None:
        raise RefusedError(
            f"engm: {node_name(node)} has let go of its statistics, so they cannot be taken for constants."
        )
    _, rstd, _ = statistics
    _, weight = batch_norm_inputs(node)
    return rstd if weight is None else rstd * weight
