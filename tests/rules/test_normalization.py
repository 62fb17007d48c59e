"""Normalisation layers against the oracle: scale and shift, and the gradient that passes through to other layers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import TOLERANCE, assert_measured, check, dtype_of, random_losses, relative, tensor, truth
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as SyncFunction

import engm
from engm.torch_internals import batch_norm_statistics

BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def losses_of(x, seed=0):
    return lambda net: random_losses(net(x.to(dtype_of(net))), seed)


def shaken(module, seed=0):
    """Scales, shifts and running statistics away from 1 and 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor_ in [*module.parameters(), *module.buffers()]:
            if tensor_.is_floating_point():
                tensor_.add_(0.3 * torch.rand_like(tensor_))
    return module


@given(
    dims=st.integers(0, 3),
    n=st.integers(2, 5),
    channels=st.integers(1, 5),
    training=st.booleans(),
    affine=st.booleans(),
    tracked=st.booleans(),
    between=st.booleans(),
    seed=st.integers(0, 99),
)
def test_batch_norm(dims, n, channels, training, affine, tracked, between, seed):
    """As the first layer, or between two others; couples in training mode and, without running statistics, always."""
    layer = shaken(BATCH_NORMS[max(dims, 1)](channels, affine=affine, track_running_stats=tracked), seed)
    layers = [layer]
    if between or not affine:
        first = nn.Linear(channels, channels) if dims == 0 else CONVOLUTIONS[dims](channels, channels, 2)
        last = nn.Linear(channels, 3) if dims == 0 else CONVOLUTIONS[dims](channels, 3, 1)
        layers = [first, layer, nn.ReLU(inplace=True), last]
    net = nn.Sequential(*layers).double().train(training)
    x = tensor(n, channels, *[4, 3, 3][:dims], seed=seed) * 2 + 1
    check(net, losses_of(x, seed), frozen=training or not tracked)


@pytest.mark.parametrize("mode", ["frozen", "calibrated"])
def test_measure_is_frozen_whatever_the_wrapper_says(mode):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)).double()
    check(net, losses_of(tensor(4, 2, 5, 5)), frozen=True, batch_norm=mode)


def test_batch_norm_called_twice_keeps_two_sets_of_statistics():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            h = self.norm(self.fc(x))
            return self.norm(torch.relu_(h) * 2 + x)

    net = Net().double()
    check(net, losses_of(tensor(5, 4)), frozen=True)
    check(net.eval(), losses_of(tensor(5, 4)))


def test_partly_training():
    """One batch norm in training mode, one in evaluation mode."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    net[1].eval()
    check(net, losses_of(tensor(5, 4)), frozen=True)


def test_running_statistics_that_move_on_do_not_change_an_earlier_graph():
    net = shaken(nn.Sequential(nn.BatchNorm1d(4))).double().eval()
    x = tensor(5, 4)
    model = engm.GradNormModule(net)
    expected = engm.measure(model, random_losses(model(x))).norms
    losses = random_losses(model(x))
    model.train()(tensor(5, 4, seed=3) + 7)
    assert relative(engm.measure(model, losses).norms, expected) == 0


@given(
    dims=st.integers(0, 3),
    n=st.integers(1, 4),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    affine=st.booleans(),
    seed=st.integers(0, 99),
)
def test_group_norm(dims, n, groups, per_group, affine, seed):
    channels = groups * per_group
    layer = shaken(nn.GroupNorm(groups, channels, affine=affine), seed)
    first = nn.Linear(channels, channels) if dims == 0 else CONVOLUTIONS[dims](channels, channels, 2)
    assume(per_group > 1 or dims > 0)  # torch refuses to normalise one value
    x = tensor(n, channels, *[5, 4, 3][:dims], seed=seed)
    check(nn.Sequential(first, layer, nn.ReLU(inplace=True)).double(), losses_of(x, seed))


@given(
    lead=st.lists(st.integers(1, 4), max_size=2),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    kind=st.sampled_from(["layer", "layer, no bias", "layer, no affine", "rms", "rms, no affine", "rms, eps"]),
    n=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_norms_over_trailing_dimensions(lead, shape, kind, n, seed):
    options = {"elementwise_affine": "no affine" not in kind}
    if kind.startswith("layer"):
        layer = nn.LayerNorm(shape, bias="no bias" not in kind, **options)
    else:
        layer = nn.RMSNorm(shape, eps=0.1 if "eps" in kind else None, **options)
    net = nn.Sequential(nn.Linear(shape[-1], shape[-1]), shaken(layer, seed)).double()
    check(net, losses_of(tensor(n, *lead, *shape, seed=seed), seed))


@given(
    dims=st.integers(1, 3),
    n=st.integers(1, 4),
    channels=st.integers(1, 4),
    training=st.booleans(),
    affine=st.booleans(),
    tracked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_instance_norm(dims, n, channels, training, affine, tracked, seed):
    """Never couples. Its output is a view, and an in-place ReLU follows."""
    layer = shaken(INSTANCE_NORMS[dims](channels, affine=affine, track_running_stats=tracked), seed)
    net = nn.Sequential(CONVOLUTIONS[dims](channels, channels, 2), layer, nn.ReLU(inplace=True)).double()
    x = tensor(n, channels, *[6, 4, 4][:dims], seed=seed)
    check(net.train(training), losses_of(x, seed))


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4).eval(),
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "layer": lambda: nn.LayerNorm((5, 5)),
    "rms": lambda: nn.RMSNorm((5, 5)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_float32_against_the_float64_truth(norm, training):
    layer = shaken(NORMS[norm]()).train(training)
    rest = [nn.GELU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(36, 5)]
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), layer, *rest)
    check(net, losses_of(tensor(8, 3, 5, 5, dtype=torch.float32)), frozen=training and norm == "batch")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", NORMS)
def test_channels_last(norm, dtype):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), shaken(NORMS[norm]()), nn.ReLU(inplace=True)).to(dtype)
    net = net.to(memory_format=torch.channels_last)
    check(net, losses_of(tensor(3, 3, 5, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("norm", NORMS)
def test_input_that_is_not_contiguous(norm):
    x = tensor(3, 10, 5, 4).permute(0, 3, 2, 1)[..., ::2]
    check(nn.Sequential(shaken(NORMS[norm]())).double(), losses_of(x))


@pytest.mark.parametrize(
    ("norm", "frozen"), [(n, "weight") for n in NORMS] + [(n, "bias") for n in NORMS if n != "rms"]
)
def test_one_parameter_frozen(norm, frozen):
    layer = shaken(NORMS[norm]())
    getattr(layer, frozen).requires_grad_(False)
    check(nn.Sequential(nn.Conv2d(4, 4, 1), layer).double(), losses_of(tensor(3, 4, 5, 5)))


@pytest.mark.parametrize("norm", NORMS)
def test_called_twice(norm):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), shaken(NORMS[norm]())

        def forward(self, x):
            h = torch.relu_(self.norm(self.conv(x)))
            if norm in ("layer", "rms"):
                return self.norm(h)
            return self.norm(h[:, :, ::2, ::2])

    check(Net().double(), losses_of(tensor(3, 4, 5, 5)))


@pytest.mark.parametrize("norm", NORMS)
def test_two_views_of_an_example(norm):
    """``torch.cat([x, x_adv])`` with one loss an example: statistics of the second half are the second half's."""
    layer = shaken(NORMS[norm]())
    net = nn.Sequential(nn.Conv2d(4, 4, 1), layer, nn.ReLU(inplace=True)).double()
    x = torch.cat([tensor(3, 4, 5, 5), tensor(3, 4, 5, 5, seed=1)])

    def losses(m):
        clean, attacked = m(x).chunk(2)
        return random_losses(attacked) + (clean * attacked).flatten(1).sum(1)

    check(net, losses, views=2)


@pytest.mark.parametrize("norm", NORMS)
def test_keyword_argument(norm):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = shaken(NORMS[norm]())

        def forward(self, x):
            return self.norm(x=x) if norm == "rms" else self.norm(input=x)

    check(Net().double(), losses_of(tensor(3, 4, 5, 5)))


@pytest.mark.parametrize("norm", NORMS)
def test_statistics_are_those_autograd_saved(norm):
    """Where hooks pack what is saved (checkpointing, offloading) they are recomputed, to the same effect."""
    net = nn.Sequential(nn.Conv2d(4, 4, 1), shaken(NORMS[norm]())).double()
    x = tensor(3, 4, 5, 5)
    model = engm.GradNormModule(net)
    expected = engm.measure(model, random_losses(model(x)))
    unpacked = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(1) or t):
        losses = random_losses(model(x))
    assert not unpacked, "reading a saved tensor runs the user's unpack hook"
    assert relative(engm.measure(model, losses).stacked, expected.stacked) <= 1e-12


# -- statistics read from a node ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("affine", [False, True])
def test_statistics_of_the_batch_from_a_node(affine, dtype):
    x = (tensor(5, 3, 4, dtype=dtype) * 2 + 1).requires_grad_()
    running = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    weight = torch.full((3,), 2.0, dtype=dtype) if affine else None
    out = F.batch_norm(x, *running, weight, weight, training=True, eps=1e-3)
    mean, rstd, training = batch_norm_statistics(out.grad_fn)
    assert training
    assert not mean.requires_grad
    var, own = torch.var_mean(x.detach(), (0, 2), correction=0)
    torch.testing.assert_close(mean, own)
    torch.testing.assert_close(rstd, (var + 1e-3).rsqrt())


def test_running_statistics_from_a_node():
    x = tensor(5, 3, 4).requires_grad_()
    running = tensor(3), tensor(3, seed=1).square()
    out = F.batch_norm(x, *running, training=False, eps=1e-3)
    mean, rstd, training = batch_norm_statistics(out.grad_fn)
    assert not training
    torch.testing.assert_close(mean, running[0])
    torch.testing.assert_close(rstd, (running[1] + 1e-3).rsqrt())


def test_other_nodes_have_no_statistics():
    x = tensor(5, 3, 4).requires_grad_()
    assert batch_norm_statistics(F.layer_norm(x, (4,)).grad_fn) is None
    assert batch_norm_statistics((x * 2).grad_fn) is None


# -- several processes -------------------------------------------------------------------------------------------------


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


def channelwise(x, *values):
    return (value.view([1, -1] + [1] * (x.dim() - 2)) for value in values)


@pytest.fixture
def first_of_two_ranks(monkeypatch):
    """torch's synchronised batch norm, whose kernels are CUDA's alone, on the CPU as the first of two processes.

    Returns a list that takes the input of the layer in the second process.
    """
    other = []

    def stats(x, eps):
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        return mean, torch.rsqrt(var + eps)

    def gather_stats(x, means, rstds, running_mean, running_var, momentum, eps, counts):
        share = (counts / counts.sum()).unsqueeze(1)
        mean = (means * share).sum(0)
        var = ((rstds**-2 - eps + means**2) * share).sum(0) - mean**2
        return mean, torch.rsqrt(var + eps)

    def normalise(x, weight, bias, mean, rstd, eps):
        mean, rstd, weight, bias = channelwise(x, mean, rstd, weight, bias)
        return (x - mean) * rstd * weight + bias

    def reduce_gradients(gy, x, mean, rstd, weight, *wanted):
        centred = x - next(channelwise(x, mean))
        dims = [0, *range(2, x.dim())]
        return gy.sum(dims), (gy * centred).sum(dims), (gy * centred).sum(dims) * rstd, gy.sum(dims)

    def input_gradient(gy, x, mean, rstd, weight, sum_dy, sum_dy_xmu, counts):
        mean, rstd, weight, sum_dy, sum_dy_xmu = channelwise(x, mean, rstd, weight, sum_dy, sum_dy_xmu)
        return (gy - (sum_dy + (x - mean) * rstd**2 * sum_dy_xmu) / counts.sum()) * rstd * weight

    def all_gather(found, own, group, async_op):
        found[0].copy_(own)
        x = other[-1]
        found[1].copy_(torch.cat([*stats(x, 1e-5), x.new_full((1,), x.numel() // x.shape[1])]))

    def forward(self, x):
        options = (self.running_mean, self.running_var, self.eps, self.momentum, Gloo(), 2)
        return SyncFunction.apply(x, self.weight, self.bias, *options)

    replaced = {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": gather_stats,
        "batch_norm_elemt": normalise,
        "batch_norm_backward_reduce": reduce_gradients,
        "batch_norm_backward_elemt": input_gradient,
        "distributed.all_gather": all_gather,
        "distributed.all_reduce": lambda *_, **__: None,  # sums that frozen statistics have no use for
    }
    for name, function in replaced.items():
        monkeypatch.setattr(f"torch.{name}", function)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", forward)
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
    mean, rstd, training = batch_norm_statistics(
        SyncFunction.apply(first(x[:4]), *layer.parameters(), None, None, layer.eps, 0.1, Gloo(), 2).grad_fn
    )
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
