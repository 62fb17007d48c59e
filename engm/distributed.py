"""What ``DistributedDataParallel`` splits over its ranks, put together again: the batch that estimates are made from.

An example's weight is of its own gradient, so it needs no other rank. What is *estimated* from a batch (A-ENGM's line,
the calibration factors, the quantile behind ``alpha="auto"``) is estimated from the examples of all ranks: every rank
then holds the same numbers, bit for bit, and a run in k processes is the run in one.

Every function takes the process group, or None for a batch that lies in this process whole; then nothing is sent and
the values come back as they are. With a group each is a collective: all of its ranks have to call it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .capture import Call


def active_group() -> ProcessGroup | None:
    """The process group of the ``DistributedDataParallel`` whose forward pass is running, if one is.

    Raises:
        RuntimeError: it takes the graph to be static, and the backward pass that measures would use up its one look.
    """
    active = DistributedDataParallel._active_ddp_module
    if active is None:
        return None
    if active.static_graph:
        raise RuntimeError(
            "DistributedDataParallel(static_graph=True) would leave the gradients unreduced: it prepares for the first "
            "backward pass it sees, and that is the one that measures norms. Leave static_graph out."
        )
    return active.process_group


def group_of(owner: object, calls: Iterable[Call]) -> ProcessGroup | None:
    """The process group that the forward pass of ``owner`` behind these calls ran under; None outside of DDP."""
    groups = (call.capture.group for call in calls if call.capture.owner is owner)
    return next((group for group in groups if group is not None), None)


def total(group: ProcessGroup | None, *values: Tensor) -> tuple[Tensor, ...]:
    """Each of the values, all of one shape and in float64, summed over the ranks: one all-reduce."""
    if group is None:
        return values
    summed = torch.stack(values)
    dist.all_reduce(summed, group=group)
    return summed.unbind(0)


def means(group: ProcessGroup | None, *values: Tensor) -> tuple[Tensor, ...]:
    """Mean over the examples of all ranks of each of the values, ``[n]`` in float64; ``n`` may differ by rank."""
    if group is None:
        return tuple(value.mean() for value in values)
    sums = [value.sum() for value in values]
    n, *sums = total(group, torch.full_like(sums[0], values[0].shape[0]), *sums)
    return tuple(value / n for value in sums)


def gathered(group: ProcessGroup | None, values: Tensor) -> Tensor:
    """The values ``[n]`` of all ranks in their order, ``[sum of n]``; ``n`` may differ by rank.

    Two all-gathers, of the lengths and of the values; the host waits for the first, because the second needs it.
    """
    if group is None:
        return values
    length = torch.full((1,), values.shape[0], dtype=torch.int64, device=values.device)
    found = [torch.empty_like(length) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, length, group=group)
    lengths = torch.cat(found).tolist()
    padded = values.new_zeros(max(lengths))
    padded[: values.shape[0]] = values
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])
