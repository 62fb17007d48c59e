"""Adversarial weight perturbation under DistributedDataParallel: two gloo processes perturb and train as one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import started
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import assert_close, batch, clone, losses_of, network, sgd

import engm
from engm.adversarial import AWP

N, RANKS, GAMMA = 8, 2, 0.05


def train(wrap: Callable[[nn.Module], nn.Module], rows: slice) -> dict[str, Any]:
    """Perturbed weights of every step, and the last ones, on ``rows`` of each batch; ENGM with GroupNorm."""
    net = network("group").to(memory_format=torch.channels_last)
    model = wrap(engm.GradNormModule(net))
    opt, awp, perturbed = engm.ENGM(model, sgd(model), 0.8), AWP(model, GAMMA), []
    for seed in range(3):
        x, y = (tensor[rows].clone() for tensor in batch(N, seed))
        opt.zero_grad()
        with awp.perturbed(lambda x=x, y=y: losses_of(model, x, y)):
            perturbed.append(clone(list(net.parameters())))
            opt.reweight(losses_of(model, x, y)).mean().backward()
        opt.step()
    return {"perturbed": perturbed, "last": clone(list(net.parameters()))}


def buffers_synchronised(rank: int) -> bool:
    """Whether the training forward still starts from rank 0's running statistics, as it does without AWP."""
    net = network("batch")
    net.register_parameter("unused", nn.Parameter(torch.zeros(2, 2)))
    model, agree = DistributedDataParallel(net, find_unused_parameters=True), []
    for step in range(3):
        x, y = batch(4, seed=10 * step + rank)
        start = net[1].running_mean.clone()
        dist.broadcast(start, src=0)
        with AWP(model).perturbed(lambda x=x, y=y: losses_of(model, x, y)):
            losses_of(model, x, y).mean().backward()
            mean = net[0](x).detach().mean((0, 2, 3))
        agree.append(torch.allclose(net[1].running_mean, 0.9 * start + 0.1 * mean))
    return all(agree)


def work(rank: int, rendezvous: str) -> dict[str, Any]:
    limit = timedelta(seconds=60)  # for a process whose partner failed
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS, timeout=limit)
    try:
        rows = slice(rank * N // RANKS, (rank + 1) * N // RANKS)
        found = train(DistributedDataParallel, rows)
        found["synchronised"] = buffers_synchronised(rank)
        with pytest.raises(ValueError, match="without static_graph=True"):
            AWP(DistributedDataParallel(network(), static_graph=True))
        return found
    finally:
        dist.destroy_process_group()


def partner(index: int, rendezvous: str, results: Path) -> None:
    torch.set_num_threads(1)
    torch.save(work(1 + index, rendezvous), results / "partner.pt")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_are_one(tmp_path: Path) -> None:
    expected = train(lambda model: model, slice(0, N))
    rendezvous = f"file://{tmp_path}/rendezvous"
    other = started(partner, (rendezvous, tmp_path), RANKS - 1)
    mine = work(0, rendezvous)
    while not other.join():
        pass
    for found in (mine, torch.load(tmp_path / "partner.pt", weights_only=True)):
        assert found.pop("synchronised")
        assert_close(found, expected)
