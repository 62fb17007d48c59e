"""The processes of a run: one, or as many as ``torchrun`` started."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .devices import choose_device
from .failures import OtherProcessError


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        device: where this process computes.
        rank: number of this process, from 0.
        world: number of processes.
    """

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks to the terminal."""
        return self.rank == 0

    def rows(self, n: int) -> slice:
        """This process's share of ``n`` rows, which the processes divide in the order of their ranks.

        Raises:
            ValueError: they cannot be shared evenly.
        """
        if n % self.world:
            raise ValueError(f"a batch of {n} examples cannot be shared evenly by {self.world} processes")
        share = n // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as the training forward pass calls it: under ``DistributedDataParallel`` if there are several.

        Buffers are not broadcast before each forward pass: TRADES and MART make two of them for one loss, and the
        second broadcast would change what the first saved. :meth:`average_buffers` keeps them together instead.
        """
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        known = inspect.signature(DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.14
        return DistributedDataParallel(model, device_ids=ids, **{option: False})  # type: ignore[arg-type]

    def total(self, counts: Sequence[int]) -> list[int]:
        """The sums of counts over the processes."""
        if self.world == 1:
            return list(counts)
        summed = torch.tensor(list(counts), dtype=torch.int64, device=self.device)
        dist.all_reduce(summed)
        return [int(value) for value in summed.tolist()]

    def average_buffers(self, net: nn.Module) -> None:
        """Sets running statistics to their mean over the processes, each of which saw its own examples."""
        if self.world == 1:
            return
        for buffer in net.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer.div_(self.world)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in here in one process fails in all, instead of leaving the others waiting for it.

        Raises:
            OtherProcessError: in the processes where nothing failed.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failed = self.total([failure is not None])[0]
        if failure is not None:
            raise failure
        if failed:
            raise OtherProcessError("another process of this run failed; it says why")

    def gather_buffers(self, net: nn.Module) -> list[dict[str, Tensor]]:
        """Every process's running statistics by name, where there are several processes."""
        if self.world == 1:
            return []
        named = [(name, buffer) for name, buffer in net.named_buffers() if buffer.is_floating_point()]
        gathered = [self.gather(buffer) for _, buffer in named]
        return [
            {name: parts[rank] for (name, _), parts in zip(named, gathered, strict=True)} for rank in range(self.world)
        ]

    def gather(self, value: Tensor) -> list[Tensor]:
        """Every process's ``value`` (of one shape), on the CPU."""
        if self.world == 1:
            return [value.cpu()]
        mine = value.to(self.device)
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine)
        return [entry.cpu() for entry in found]


@contextmanager
def from_environment(device: str = "auto") -> Iterator[Processes]:
    """Connects the processes that ``torchrun`` describes in the environment: gloo on CPUs, NCCL on GPUs. Or it is one.

    Raises:
        ValueError: no such device here, or an environment that is not torchrun's.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device)
    if world == 1:
        yield Processes(chosen)
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {world} and {', '.join(missing)} not set: start several processes with torchrun"
        )
    rank = int(os.environ["RANK"])
    if chosen.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if chosen.index is not None:
            raise ValueError(
                f"--device {device}: with several processes each takes a GPU of its own; use --device cuda"
            )
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} has no GPU: start no more than {torch.cuda.device_count()} on this machine"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=world)
    try:
        yield Processes(chosen, rank, world)
    finally:
        dist.destroy_process_group()
