"""Replays hold no more memory at once than steps by hand."""

import pytest
import torch
import torch.nn.functional as F
from interleaved import peak_allocation
from training import batch, network

import engm


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_peak(norm):
    net = network(norm, dtype=torch.float32)
    model = engm.GradNormModule(net, calibrate_every=1000)
    opt = engm.ENGM(model, torch.optim.SGD(net.parameters(), 0.0), 0.5)
    x, y = batch(32, dtype=torch.float32)

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    step = engm.record(opt, losses)
    peaks = []
    for way in (lambda: opt.backward(losses(x, y)), lambda: step(x, y)):
        for _ in range(4):
            way()
            opt.zero_grad()
        peaks.append(peak_allocation(way))
        opt.zero_grad()
    assert step.report().replayed
    assert 0 < peaks[1] <= 1.02 * peaks[0]
