"""Networks whose parameters ``torch.distributed.fsdp.fully_shard`` split over processes (FSDP2).

The parameters of such a network are shards, and the tensors that a loss is differentiated by are others: whole copies
that take the shards' places while a part of the network runs. They are told apart by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from .layers import named_modules

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ORDER = (
    "shard first, then wrap: fully_shard(layer) for the layers, fully_shard(net), model = engm.GradNormModule(net), "
    "and the optimizer last."
)


def shards_of(net: nn.Module) -> ProcessGroup | None:
    """The processes that the parameters of ``net`` are split over; None if they are whole. Whole copies are let go.

    Raises:
        TypeError: it was split by the older ``FullyShardedDataParallel``.
        ValueError: it was split in another way than over one one-dimensional mesh.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if any(isinstance(module, FullyShardedDataParallel) for module in net.modules()):
        raise TypeError(
            "FullyShardedDataParallel flattens the parameters of a network, so they have no per-example gradients: "
            f"use torch.distributed.fsdp.fully_shard, and {ORDER}"
        )
    parts = sharded_parts(net)
    for _, part in parts:
        part.reshard()
    meshes = {parameter.device_mesh for parameter in net.parameters() if isinstance(parameter, DTensor)}
    if not meshes:
        return None
    shapes = sorted(str(tuple(mesh.shape)) for mesh in meshes)
    if not parts or shapes[1:] or len(next(iter(meshes)).shape) != 1:
        raise ValueError(
            "parameters may be split by fully_shard over one mesh of one dimension, in which every process has "
            f"examples of its own; here they are {'split over' if parts else 'tensor-parallel, over'} "
            f"{len(meshes)} mesh(es) of shape {', '.join(shapes)}. Give fully_shard a one-dimensional mesh, and leave "
            "tensor parallelism out."
        )
    return meshes.pop().get_group()


def sharded_parts(net: nn.Module) -> list[tuple[str, Any]]:
    """Name and module of every part that ``fully_shard`` was called on."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [(name, module) for name, module in named_modules(net) if isinstance(module, FSDPModule)]


@contextmanager
def noting_leaves(
    parts: Sequence[tuple[str, Any]], shard_group: ProcessGroup | None, leaves: dict[str, nn.Parameter]
) -> Iterator[None]:
    """While this context is open, parts that run write their whole parameters into ``leaves``, by name.

    Args:
        parts: of the network, see :func:`sharded_parts`.
        shard_group: what :func:`shards_of` found when it was wrapped.
        leaves: written to.

    Raises:
        RuntimeError: it was not split then, and is now.
    """
    if not parts:
        yield
        return
    if shard_group is None:
        raise RuntimeError(f"this network was split by fully_shard after it was wrapped: {ORDER}")
    from torch.distributed.tensor import DTensor

    handles = []
    try:
        for prefix, part in parts:

            def note(module: nn.Module, _: Any, prefix: str = prefix) -> None:
                found = module.named_parameters(prefix)
                leaves.update((name, tensor) for name, tensor in found if not isinstance(tensor, DTensor))

            handles.append(part.register_forward_pre_hook(note))  # after fully_shard's own, which gathers them
        yield
    finally:
        for handle in handles:
            handle.remove()
