"""Normalisation layers against the oracle: scale and shift, and the gradient that passes through to other layers."""

import pytest
import torch
import torch.nn.functional as F
from engine_checks import check
from hypothesis import assume, given
from hypothesis import strategies as st
from normalization import losses_of, shaken
from oracle import random_losses, relative, tensor
from torch import nn

import engm
from engm.torch_internals import batch_norm_statistics

pytestmark = pytest.mark.torch_insides

BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


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
    """A batch norm couples in training mode and, without running statistics, always."""
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
    """An instance norm never couples. Its output is a view, and an in-place ReLU follows."""
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
    """Where hooks pack what is saved (checkpointing, offloading) statistics are computed again, to the same effect."""
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
