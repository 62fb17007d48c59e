"""Backward passes that take the statistics of batch norms for constants (design section 2.5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from .._C import FrozenStatistics
from ..checks import RefusedError
from ..torch_internals import (
    Node,
    batch_norm_inputs,
    batch_norm_statistics,
    node_name,
    own_parameters,
    recomputed_once,
)


@dataclass(frozen=True)
class BatchNormNode:
    """One batch norm in a graph that takes its statistics from the batch.

    Attributes:
        node: its autograd node.
        gain: gives ``scale / sigma``, ``[C]``, in the backward pass, where alone those of ``fully_shard`` are whole.
        slot: which input of the node is the layer's input.
        output_nr: which output of the node is the layer's output.
    """

    node: Node
    gain: Callable[[], Tensor]
    slot: int = 0
    output_nr: int = 0


@contextmanager
def frozen_statistics(batch_norms: Iterable[BatchNormNode]) -> Iterator[None]:
    """While the context is open, backward passes take the statistics of these batch norms for constants.

    The gradient of a layer's input becomes ``scale / sigma`` times that of its output, both ``[n, C, *S]``.
    """
    frozen = FrozenStatistics()
    try:
        for batch_norm in batch_norms:
            frozen.freeze(batch_norm.node, batch_norm.gain, batch_norm.slot, batch_norm.output_nr)
        with recomputed_once():  # the nodes have run, and used up their statistics, when the gains are asked for
            yield
    finally:
        frozen.thaw()


def gain_of(module: nn.Module, rstd: Tensor) -> Tensor:
    """``scale / sigma`` of a batch norm, ``[C]``, from the reciprocal standard deviation of its call, ``[C]``."""
    weight = own_parameters(module).get("weight")
    return rstd if weight is None else rstd * weight.detach()


def gain_of_node(node: Node) -> Tensor:
    """``scale / sigma`` of the batch norm behind an autograd node, ``[C]``; no module is needed.

    Raises:
        RuntimeError: the node has let go of its statistics.
    """
    with recomputed_once():
        statistics = batch_norm_statistics(node)
        if statistics is None:
            raise RefusedError(
                f"engm: {node_name(node)} has let go of its statistics, so they cannot be taken for constants."
            )
        _, rstd, _ = statistics
        _, weight = batch_norm_inputs(node)
    return rstd if weight is None else rstd * weight
