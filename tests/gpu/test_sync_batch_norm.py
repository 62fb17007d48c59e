"""Synchronised batch norm on its own kernels: a process group of one rank, which torch would otherwise not ask."""

import copy

import pytest
import torch
import torch.distributed as dist
from device_cases import DEVICE, cuda_only, gpu
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as SyncFunction

import engm

pytestmark = [*gpu, cuda_only]


@pytest.fixture
def synchronised(tmp_path, monkeypatch):
    """Every ``nn.SyncBatchNorm`` in training mode talks to the group, though it has one rank."""
    if not dist.is_nccl_available():
        pytest.skip("torch was built without NCCL")
    if dist.is_initialized():
        pytest.skip("a process group is running already")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)

    def forward(self, x):
        options = (self.running_mean, self.running_var, self.eps, self.momentum, dist.group.WORLD, 1)
        return SyncFunction.apply(x, self.weight, self.bias, *options)

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", forward)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_frozen_norms_and_the_update_are_those_of_a_batch_norm(synchronised, memory):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3)).double()
    x, c = torch.randn(6, 3, 8, 8).double(), torch.randn(6, 4, 4, 4).double()
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)).to(DEVICE, memory_format=memory)
    results = []
    for own, device in ((net, torch.device("cpu")), (twin, DEVICE)):
        model = engm.GradNormModule(own, batch_norm="frozen")
        opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=1.0)
        y = model(x.to(device, memory_format=memory if device == DEVICE else torch.contiguous_format))
        stats = opt.backward((y * c.to(device)).flatten(1).sum(1))
        results.append((stats.norms, [p.grad for p in own.parameters()]))
    (norms, gradients), (got_norms, got_gradients) = results
    torch.testing.assert_close(got_norms.cpu(), norms, rtol=1e-9, atol=0)
    for got, want in zip(got_gradients, gradients, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-8, atol=1e-10)


def test_the_node_keeps_the_statistics(synchronised):
    layer = nn.SyncBatchNorm(5).to(DEVICE)
    x = (torch.randn(7, 5, 3, device=DEVICE) * 2 + 1).requires_grad_()
    y = layer(x)
    mean, rstd, training = engm.rules.normalization.batch_norm_statistics(y.grad_fn)
    var, own = torch.var_mean(x.detach(), (0, 2), correction=0)
    assert training
    torch.testing.assert_close(mean, own)
    torch.testing.assert_close(rstd, (var + layer.eps).rsqrt())
