"""The local correction is the exact backward pass of the one batch norm behind a layer.

Where that batch norm is all that couples, and its correlation is taken over the whole batch, corrected norms are the
exact ones. Elsewhere they are at least nearer to them than frozen ones.
"""

import pytest
import torch
from engine_checks import assert_measured
from hypothesis import given
from hypothesis import strategies as st
from oracle import random_losses, relative, tensor, truth
from torch import nn

import engm
from engm.backward.norms import lent_mode, measure_graph, own_mode
from engm.backward.prepare import planned_losses

pytestmark = pytest.mark.torch_insides

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def corrected(model, losses, *, correct=True):
    graph = planned_losses(model, losses)
    return measure_graph(graph, losses, own_mode(model, graph) if correct else lent_mode(model, graph))


def check_corrected(net, x):
    """Corrected norms of every tensor are the exact ones, and the frozen ones are not."""
    net = net.double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.rand_like(parameter))
    model = engm.GradNormModule(net)
    losses = random_losses(model(x))
    expected = truth(net, lambda m: random_losses(m(x)))
    measured = corrected(model, losses)
    assert measured.mode == "corrected"
    assert_measured(measured, expected)
    raw = corrected(model, losses, correct=False)
    assert raw.mode == "frozen"
    assert relative(raw.norms, expected.norms) > 1e-4, "nothing to correct here"


@pytest.mark.parametrize("n", [2, 5, 16])
@pytest.mark.parametrize("affine", [True, False])
def test_linear(n, affine):
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=affine), nn.ReLU(inplace=True), nn.Linear(4, 3))
    check_corrected(net, tensor(n, 5))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
        {"kernel_size": 1},
        {"kernel_size": 2, "groups": 2},
        {"kernel_size": 3, "groups": 4, "padding": 1},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution(dims, options):
    net = nn.Sequential(
        CONVOLUTIONS[dims](4, 4, **options),
        BATCH_NORMS[dims](4),
        nn.ReLU(inplace=True),
        nn.Flatten(1),
        nn.LazyLinear(3),
    )
    x = tensor(5, 4, *[7, 6, 5][:dims])
    net.double()
    net(x)
    check_corrected(net, x)


@given(
    n=st.integers(2, 6),
    c=st.integers(1, 4),
    d=st.integers(1, 4),
    size=st.integers(2, 6),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_any_convolution(n, c, d, size, kernel, stride, padding, seed):
    torch.manual_seed(seed)
    size = max(size, kernel)
    net = nn.Sequential(nn.Conv2d(c, d, kernel, stride, padding), nn.BatchNorm2d(d)).double()
    x = tensor(n, c, size, size, seed=seed)
    model = engm.GradNormModule(net)
    losses = random_losses(model(x), seed)
    assert_measured(corrected(model, losses), truth(net, lambda m: random_losses(m(x), seed)))


def test_channels_last():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(memory_format=torch.channels_last)
    check_corrected(net, tensor(5, 4, 6, 6).contiguous(memory_format=torch.channels_last))


def test_batch_norm_with_frozen_scale_and_shift():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    net[1].requires_grad_(False)
    check_corrected(net, tensor(5, 4, 6, 6))


def test_batch_norm_without_running_statistics_in_evaluation_mode():
    check_corrected(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()).eval(),
        tensor(5, 4, 6, 6),
    )


def test_output_that_has_another_reader():
    """The layer's output goes around the batch norm too; only what goes through it is corrected."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            h = self.conv(x)
            return torch.relu(self.norm(h)) + h.square()

    check_corrected(Around(), tensor(5, 4, 6, 6))


def test_last_batch_norm_of_a_stack():
    """Of two, the one nearer to the losses is alone with its coupling: its convolution is exact, the other nearer."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    ).double()
    x = tensor(8, 3, 7, 7)
    model = engm.GradNormModule(net)
    losses = random_losses(model(x))
    expected = truth(net, lambda m: random_losses(m(x))).squared_norms
    good, raw = corrected(model, losses).squared_norms, corrected(model, losses, correct=False).squared_norms
    for name in ("3.weight", "4.weight", "4.bias"):
        assert relative(good[name], expected[name]) <= 1e-9
    for name in ("0.weight", "3.weight"):
        assert (good[name] / expected[name]).log().abs().mean() < (raw[name] / expected[name]).log().abs().mean()


@pytest.mark.parametrize("kind", ["used twice", "in-place between", "two batch norms", "positions"])
def test_where_it_does_not_apply_the_norms_are_the_frozen_ones(kind):
    """This is no error, because calibration takes care of the rest."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4) if kind == "positions" else nn.Conv1d(4, 4, 1)
            self.norm, self.again = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x):
            h = self.layer(x)
            if kind == "used twice":
                return self.norm(h) + self.layer(x * 2)
            if kind == "in-place between":
                return self.norm(h.mul_(2.0))
            if kind == "two batch norms":
                return self.norm(h) + self.again(h).tanh()
            return self.norm(h)

    net = Net().double()
    x = tensor(6, 4, 4)
    model = engm.GradNormModule(net)
    losses = random_losses(model(x))
    measured, raw = corrected(model, losses).squared_norms, corrected(model, losses, correct=False).squared_norms
    if kind == "two batch norms":  # one of the two is corrected
        exact = truth(net, lambda m: random_losses(m(x))).squared_norms["layer.weight"]
        distance = [(found["layer.weight"] / exact).log().abs().mean() for found in (measured, raw)]
        assert distance[0] < distance[1]
    else:
        assert relative(measured["layer.weight"], raw["layer.weight"]) == 0


def test_evaluation_mode_corrects_nothing():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).double().eval()
    x = tensor(5, 4, 6, 6)
    model = engm.GradNormModule(net)
    losses = random_losses(model(x))
    measured = corrected(model, losses)
    assert measured.mode == "plain"
    assert_measured(measured, truth(net, lambda m: random_losses(m(x))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    x = tensor(8, 3, 6, 6)
    expected = truth(net, lambda m: random_losses(m(x))).norms
    model = engm.GradNormModule(net)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = random_losses(model(x.float()).float())
    assert relative(corrected(model, losses).norms, expected) <= (1e-5 if dtype == torch.float32 else 0.1)


def test_averages_are_over_the_whole_batch():
    """A part of a large batch would do for the mean, but not for the noise that it brings into the factors."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    x = tensor(64, 3, 6, 6)
    model = engm.GradNormModule(net)
    losses = random_losses(model(x))
    assert_measured(corrected(model, losses), truth(net, lambda m: random_losses(m(x))))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
def test_a_convolution_that_pads_nothing(mode):
    """In other modes than zeros it copies its input all the same."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv1d(4, 5, 1, padding_mode=mode), nn.BatchNorm1d(5), nn.Tanh(), nn.Flatten(), nn.Linear(40, 3)
    )
    check_corrected(net.double(), tensor(20, 4, 8))
