"""Two gloo processes: ``DistributedDataParallel(engm.GradNormModule(net))`` by ``reweight``."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from training import assert_close, batch, grads, losses_of, network, sgd

import engm

N, RANKS, STEPS = 8, 2, 3
METHODS = {
    "engm": lambda model, inner: engm.ENGM(model, inner, 5.0),
    "nengm": lambda model, inner: engm.NENGM(model, inner, 0.45),
    "msgd": engm.MSGD,
}


def train(method, wrap, rows):
    """Parameters after a few steps on ``rows`` of each batch, and the first step's weights."""
    net = network("group")
    model = wrap(engm.GradNormModule(net))
    opt = METHODS[method](model, sgd(model))
    weights = None
    for step in range(STEPS):
        x, y = (t[rows].clone() for t in batch(N, seed=step))
        x.requires_grad_()
        opt.zero_grad()
        opt.reweight(losses_of(model, x, y), x).mean().backward()
        opt.step()
        weights = opt.stats.weights if weights is None else weights
    return [p.detach() for p in net.parameters()], weights


def refused(method):
    """What ``backward`` says under DDP, with and without synchronisation, and whether it left gradients."""
    model = DistributedDataParallel(engm.GradNormModule(network("group")))
    opt = METHODS[method](model, sgd(model))
    x, y = batch(4)
    with pytest.raises(RuntimeError) as caught:
        opt.backward(losses_of(model, x, y), x)
    return str(caught.value), grads(model) == [None] * len(grads(model))


def work(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    try:
        rows = slice(rank * N // RANKS, (rank + 1) * N // RANKS)
        found = {method: train(method, DistributedDataParallel, rows) for method in METHODS}
        found["refused"] = {method: refused(method) for method in METHODS}
        torch.save(found, results / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the processes found."""
    results = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (port, results), nprocs=RANKS)
    return [torch.load(results / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("method", METHODS)
class TestTwoProcesses:
    def test_are_one(self, ranks, method):
        parameters, weights = train(method, lambda model: model, slice(0, N))
        for found, _ in (rank[method] for rank in ranks):
            assert_close(found, parameters)
        assert_close(torch.cat([rank[method][1] for rank in ranks]), weights)
        assert method == "msgd" or 0 < int((weights < 1).sum()) < N

    def test_backward_is_one_clear_error(self, ranks, method):
        for rank in ranks:
            message, untouched = rank["refused"][method]
            assert "opt.reweight(losses).mean().backward()" in message
            assert untouched


def test_wrapping_the_other_way_round_is_refused():
    class Fake(DistributedDataParallel):
        def __init__(self):
            torch.nn.Module.__init__(self)

    with pytest.raises(TypeError, match=r"DistributedDataParallel\(engm.GradNormModule\(net\)\)"):
        engm.GradNormModule(Fake())
