"""SyncBatchNorm, in one process and as the first of two."""

import pytest
import torch
from engine_checks import TOLERANCE, assert_measured, check
from normalization import losses_of, shaken
from oracle import random_losses, relative, tensor, truth
from synchronised import KERNELS, forward_over, stats
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as SyncFunction

import engm
from engm.torch_internals import batch_norm_statistics

pytestmark = pytest.mark.torch_insides


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_sync_batch_norm_in_one_process_is_a_batch_norm(affine, training):
    layer = shaken(nn.SyncBatchNorm(4, affine=affine))
    net = nn.Sequential(nn.Conv2d(3, 4, 2), layer, nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)).double().train(training)
    check(net, losses_of(tensor(5, 3, 5, 5)), frozen=training)


class Gloo:
    """As much of a process group as torch's function asks of it."""

    def _get_backend_name(self):
        return "gloo"


@pytest.fixture
def first_of_two_ranks(monkeypatch):
    """torch's synchronised batch norm, whose kernels are CUDA's alone, on the CPU as the first of two processes.

    Returns a list that takes the input of the layer in the second process.
    """
    other = []

    def all_gather(found, own, group, async_op):
        found[0].copy_(own)
        x = other[-1]
        found[1].copy_(torch.cat([*stats(x, 1e-5), x.new_full((1,), x.numel() // x.shape[1])]))

    for name, function in KERNELS.items():
        monkeypatch.setattr(name, function)
    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    # These are sums that frozen statistics have no use for.
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", forward_over(Gloo(), 2))
    return other


@pytest.mark.parametrize("dims", [0, 2])
def test_sync_batch_norm_has_the_statistics_of_all_processes(first_of_two_ranks, dims):
    """Frozen norms of a rank are those that its examples have in the whole batch."""
    first = nn.Linear(3, 4) if dims == 0 else nn.Conv2d(3, 4, 2)
    last = nn.Linear(4, 2) if dims == 0 else nn.Conv2d(4, 2, 1)
    layer = shaken(nn.SyncBatchNorm(4))
    whole = nn.BatchNorm1d(4) if dims == 0 else nn.BatchNorm2d(4)
    whole.load_state_dict(layer.state_dict())
    net = nn.Sequential(first, layer, nn.Tanh(), last).double()
    x = tensor(7, 3, *[4, 4][:dims]) * 2 + 1
    c = tensor(7, *last(whole.double()(first(x))).shape[1:], seed=1)
    expected = truth(nn.Sequential(first, whole, nn.Tanh(), last), lambda m: (m(x) * c).flatten(1).sum(1), frozen=True)
    first_of_two_ranks.append(first(x[4:]).detach())
    model = engm.GradNormModule(net, batch_norm="frozen")
    losses = (model(x[:4]) * c[:4]).flatten(1).sum(1)
    measured = engm.measure(model, losses)
    assert measured.mode == "frozen"
    expected.gradients = {name: gradient[:4] for name, gradient in expected.gradients.items()}
    assert_measured(measured, expected)
    out = SyncFunction.apply(first(x[:4]), *layer.parameters(), None, None, layer.eps, 0.1, Gloo(), 2)
    mean, rstd, training = batch_norm_statistics(out.grad_fn)
    var, own = torch.var_mean(first(x), [0, *range(2, 2 + dims)], correction=0)
    assert training
    assert relative(mean, own) <= TOLERANCE["norm, float64"]
    assert relative(rstd, (var + layer.eps).rsqrt()) <= TOLERANCE["norm, float64"]


def test_sync_batch_norm_of_all_processes_under_hooks_that_pack(first_of_two_ranks):
    first_of_two_ranks.append(tensor(5, 4))
    model = engm.GradNormModule(nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4)).double())
    packed = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with packed, pytest.raises(RuntimeError, match=r"SyncBatchNorm over several processes.*hooks pack"):
        model(tensor(5, 3))


@pytest.mark.parametrize("mode", ["calibrated", "exact"])
def test_sync_batch_norm_of_all_processes_is_not_calibrated(first_of_two_ranks, mode):
    """A few exact gradients of this process would hold the losses of the others."""
    first_of_two_ranks.append(tensor(5, 4))
    model = engm.GradNormModule(nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4)).double(), batch_norm=mode)
    losses = random_losses(model(tensor(5, 3)))
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=1.0)
    for call in (engm.per_example_grad_norms, lambda _, found: opt.backward(found)):
        with pytest.raises(RuntimeError, match=r"SyncBatchNorm over several processes.*batch_norm='frozen'"):
            call(model, losses)
    assert all(parameter.grad is None for parameter in model.parameters())
