"""How a batch that is split over ranks is put together again where something is estimated from it.

An example's weight depends on that example's gradient alone, so no other rank is needed. What is *estimated* from a
batch (A-ENGM's line, the calibration factors, the quantile behind ``alpha="auto"``) is estimated from the examples of
all ranks: every rank then holds the same numbers, bit for bit, and a run in k processes is the run in one.

A function that reduces takes the process group, or None for a batch that lies in this process whole; then nothing is
sent and the values come back as they are. With a group the call is a collective, which all ranks of the group have to
make. Gradients are left to ``DistributedDataParallel`` itself, to which :func:`backpropagate_leaves` hands them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

# Bytes of gradients in one call of autograd: a call costs tens of microseconds, while a reduction starts only when a
# bucket of 25 MB (the first: 1 MB) is full.
HANDED_OVER_AT_ONCE = 4 << 20


@dataclass(frozen=True)
class Ranks:
    """The processes whose batches are one batch, as a forward pass found them.

    Attributes:
        group: the processes.
        reduces: whether the backward pass behind this forward pass will average gradients over the processes, which
            under ``no_sync`` it does not.
        joining: whether this is inside ``join()``, where a rank that ran out of batches answers the reduction of
            gradients alone.
        data_parallel: the ``DistributedDataParallel`` that the pass ran in, weakly, if it did.
    """

    group: ProcessGroup
    reduces: bool = True
    joining: bool = False
    data_parallel: weakref.ref[DistributedDataParallel] | None = field(default=None, compare=False, repr=False)

    def now(self) -> Ranks:
        """The same for a pass that runs now, and not when these were found."""
        wrapper = None if self.data_parallel is None else self.data_parallel()
        return self if wrapper is None else replace(self, reduces=wrapper.require_backward_grad_sync)

    def estimating_group(self) -> ProcessGroup:
        """The process group, for an estimate from the batch of all ranks.

        Raises:
            RuntimeError: the forward pass ran inside ``join()``, where not all ranks would answer.
        """
        if self.joining:
            raise RuntimeError(
                "inside join() ranks that ran out of batches take part in the reduction of gradients alone, and this "
                "step estimates from the batch of all ranks (A-ENGM's regression, alpha='auto', the calibration of "
                "batch norm). Give every rank as many batches (DistributedSampler), or use ENGM with a fixed alpha and "
                "no batch norm in training mode."
            )
        return self.group


def total(group: ProcessGroup | None, *values: Tensor) -> tuple[Tensor, ...]:
    """Each of the values, all of one shape and in float64, summed over the ranks by one all-reduce."""
    if group is None:
        return values
    summed = torch.stack(values)
    dist.all_reduce(summed, group=group)
    return summed.unbind(0)


def fewest(group: ProcessGroup, number: int, device: torch.device) -> int:
    """The least of the ranks' numbers; the host waits for the answer."""
    least = torch.tensor(number, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group)
    return int(least)


def on_any(group: ProcessGroup | None, answer: bool, device: torch.device) -> bool:
    """Whether the answer is yes on any of the ranks; the host waits for it."""
    return answer if group is None else bool(most(group, int(answer), device))


def most(group: ProcessGroup, number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers; the host waits for the answer."""
    return -fewest(group, -number, device)


def told_by(group: ProcessGroup, rank: int, said: Any) -> Any:
    """What one rank of the group says, on all of them; the others' words are ignored."""
    words = [said]
    dist.broadcast_object_list(words, group_src=rank, group=group)
    return words[0]


def said_by_each(group: ProcessGroup, said: T) -> list[T]:
    """What each rank of the group says, in their order; the host waits for it."""
    words: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(words, said, group=group)
    return words


def means(group: ProcessGroup | None, *values: Tensor) -> tuple[Tensor, ...]:
    """The mean over the examples of all ranks, for each of the values ``[n]`` in float64; ``n`` may differ by rank."""
    if group is None:
        return tuple(value.mean() for value in values)
    sums = [value.sum() for value in values]
    n, *sums = total(group, torch.full_like(sums[0], values[0].shape[0]), *sums)
    return tuple(value / n for value in sums)


def gathered(group: ProcessGroup | None, values: Tensor) -> Tensor:
    """The values ``[n]`` of all ranks in their order, ``[sum of n]``; ``n`` may differ by rank.

    There are two all-gathers, of the lengths and of the values; the host waits for the lengths, to know how much comes.
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


def backpropagate_leaves(gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Gives parameters their gradients by the way of autograd, where ``DistributedDataParallel`` waits for them.

    The wrapper then does what it does in any backward pass: autograd adds to ``p.grad``, and as soon as a bucket of
    parameters is complete the wrapper reduces it, while the gradients that follow are still to be computed. Under
    ``no_sync`` nothing is reduced.

    Args:
        gradients: ``(parameter, gradient)``, each parameter once; consumed a few megabytes at a time.
    """
    held: list[tuple[Tensor, Tensor]] = []
    size = 0
    for parameter, gradient in gradients:
        held.append((parameter, gradient))
        size += gradient.numel() * gradient.element_size()
        if size >= HANDED_OVER_AT_ONCE:
            _backpropagate(held)
            size = 0
    _backpropagate(held)


def _backpropagate(held: list[tuple[Tensor, Tensor]]) -> None:
    """Hands the gradients over and empties the list."""
    if held:
        parameters, gradients = zip(*held, strict=True)
        held.clear()
        torch.autograd.backward(parameters, gradients)
