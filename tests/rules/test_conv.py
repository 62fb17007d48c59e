"""Convolutions against the oracle: geometry, layout, sharing, and what users do around them."""

import pytest
import torch
from engine_checks import check
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import dtype_of, random_losses, relative, tensor
from torch import nn

import engm
from engm.terms import combination

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def losses_of(x, seed=0):
    return lambda net: random_losses(net(x.to(dtype_of(net))), seed)


@st.composite
def settings_of_a_convolution(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    in_channels = groups * draw(st.integers(1, 3))
    out_channels = in_channels if (depthwise := draw(st.booleans())) else groups * draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    kind = draw(st.sampled_from(["int", "same", "valid", "mixed"]))
    stride = (1,) * dims if kind == "same" else tuple(draw(st.integers(1, 3)) for _ in range(dims))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    pads = {"int": (draw(st.integers(0, 2)),) * dims, "mixed": tuple(draw(st.integers(0, 2)) for _ in range(dims))}
    size = tuple(d * (k - 1) + 1 + draw(st.integers(0, 5 - dims)) for k, d in zip(kernel, dilation, strict=True))
    options = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "kernel_size": kernel,
        "stride": stride,
        "dilation": dilation,
        "groups": in_channels if depthwise else groups,
        "padding": pads.get(kind, kind),
        "padding_mode": mode,
        "bias": draw(st.booleans()),
    }
    return dims, size, options


def widest_padding(options):
    spans = [d * (k - 1) for k, d in zip(options["kernel_size"], options["dilation"], strict=True)]
    widest = {"same": [-(-span // 2) for span in spans], "valid": [0]}.get(str(options["padding"]))
    return options["padding"] if widest is None else widest


@given(
    setting=settings_of_a_convolution(),
    n=st.integers(1, 4),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_any_geometry(setting, n, dtype, seed):
    dims, size, options = setting
    pads = widest_padding(options)
    assume(options["padding_mode"] == "zeros" or max(pads) < min(size))
    torch.manual_seed(seed)
    layer = CONVOLUTIONS[dims](**options).to(dtype)
    x = tensor(n, options["in_channels"], *size, seed=seed, dtype=dtype)
    check(nn.Sequential(layer), losses_of(x, seed))


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_same_padding_is_uneven_for_even_kernels(kernel, mode, dims):
    layer = CONVOLUTIONS[dims](2, 3, kernel, padding="same", padding_mode=mode).double()
    check(nn.Sequential(layer), losses_of(tensor(2, 2, *[5] * dims)))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("stride", [1, 2])
def test_in_a_network(channels_last, dtype, stride):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=stride, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 4, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).to(dtype)
    x = tensor(4, 3, 9, 9, dtype=dtype)
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    check(net, losses_of(x))


@pytest.mark.parametrize("size", [4, 8, 20])
def test_both_sides_of_the_choice_of_form(size):
    net = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1)).double()
    check(net, losses_of(tensor(2, 4, size, size)))


def test_large_mean_does_not_cancel():
    """Maps of 4 x 4 take the Gram form; their activations have a mean of 300 and a spread of 1."""
    net = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False))
    x = tensor(4, 8, 4, 4, dtype=torch.float32) + 300
    c = tensor(4, 16, 4, 4, seed=1, dtype=torch.float32)
    c = c - c.mean((2, 3), keepdim=True)
    check(net, lambda m: (m(x.to(dtype_of(m))) * c.to(dtype_of(m))).flatten(1).sum(1), step=False)


def test_input_that_is_not_contiguous():
    x = tensor(3, 6, 7, 2).permute(0, 3, 2, 1)[..., ::2]
    check(nn.Sequential(nn.Conv2d(2, 3, 2)).double(), losses_of(x))


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_one_parameter_frozen(trained):
    layer = nn.Conv2d(2, 3, 2).double()
    getattr(layer, "bias" if trained == "weight" else "weight").requires_grad_(False)
    check(nn.Sequential(layer), losses_of(tensor(3, 2, 4, 4)))


class Pyramid(nn.Module):
    """One convolution on maps of two sizes, as detection heads do."""

    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, **options)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        big = torch.relu(self.conv(x))
        small = self.conv(nn.functional.avg_pool2d(x, 2))
        return self.head(big.mean((2, 3)) + small.amax((2, 3)))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
        {"kernel_size": (2, 3), "stride": (3, 1), "padding": (1, 0)},
        {"kernel_size": 3, "stride": 3, "groups": 3},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 1, "stride": 2},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_called_twice_with_different_sizes(options, dtype):
    check(Pyramid(**options).to(dtype), losses_of(tensor(3, 3, 11, 12, dtype=dtype)))


@given(
    dims=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    sizes=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=2, max_size=3),
)
def test_any_number_of_uses(dims, kernel, stride, padding, dilation, sizes):
    """Uses of any sizes are laid side by side; remainders of the stride must not leak from one to the next."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = CONVOLUTIONS[dims](2, 3, kernel, stride, padding, dilation)

        def forward(self, xs):
            return torch.cat([self.conv(x).flatten(1) for x in xs], 1)

    least = dilation * (kernel - 1) + 1
    xs = [tensor(2, 2, *[least + extra for extra in size[:dims]], seed=k) for k, size in enumerate(sizes)]
    check(Net().double(), lambda net: random_losses(net(xs)))


class Tied(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, bias=False, **first), nn.Conv2d(3, 3, 3, bias=False, **second)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.relu(self.a(x))).flatten(1)


@pytest.mark.parametrize("second", [{"padding": 1}, {"padding": 0}, {"padding": 1, "padding_mode": "circular"}])
def test_two_modules_share_a_weight(second):
    check(Tied({"padding": 1}, second).double(), losses_of(tensor(3, 3, 6, 6)))


@pytest.mark.parametrize("second", [{"stride": 2}, {"dilation": 2}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_modules_of_different_geometry_share_a_weight(second, dtype):
    check(Tied({"padding": 1}, second).to(dtype), losses_of(tensor(3, 3, 6, 6, dtype=dtype)))


def test_keyword_argument_and_subclass():
    class Mine(nn.Conv1d):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = Mine(2, 3, 2)

        def forward(self, x):
            return self.conv(input=x).relu_()

    check(Net().double(), losses_of(tensor(3, 2, 6)))


@pytest.mark.parametrize("again", [False, True])
def test_images_of_many_sizes_each_by_a_call_of_its_own(again, monkeypatch):
    """Nobody forms gradients, whether or not some example has a share in two calls."""
    formed = []
    whole = combination.squared_norm_of_dense
    monkeypatch.setattr(combination, "squared_norm_of_dense", lambda term: formed.append(1) or whole(term))
    net = nn.Conv2d(2, 3, 3).double()
    images = [tensor(1, 2, 4 + k, 5 + k % 3, seed=k) for k in range(6)]

    def losses(module):
        found = torch.cat([torch.tanh(module(image)).square().mean((1, 2, 3)) for image in images])
        return found + module(images[0][:, :, :3, :3]).sum() * torch.eye(6)[3] if again else found

    model = engm.GradNormModule(net)
    for _ in range(2):
        wanted = [torch.autograd.grad(loss, net.weight, retain_graph=True)[0].norm() for loss in losses(net)]
        found = engm.measure(model, losses(model)).squared_norms["weight"].sqrt()
        assert relative(found, torch.stack(wanted)) <= 1e-9
    assert not formed
