"""Transposed convolutions against the oracle: every geometry, output sizes, and weights shared with a convolution."""

import pytest
import torch
from engine_checks import check
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import dtype_of, random_losses, tensor
from torch import nn

import engm

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def losses_of(x, seed=0):
    return lambda net: random_losses(net(x.to(dtype_of(net))), seed)


@st.composite
def settings_of_a_layer(draw):
    dims = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    stride, dilation = each(1, 3), each(1, 3)
    options = {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": each(1, 3),
        "stride": stride,
        "padding": each(0, 2),
        "output_padding": tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)),
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    return dims, each(1, 5 - dims), options


def output_size(size, options):
    rows = zip(*(options[k] for k in ("kernel_size", "stride", "padding", "output_padding", "dilation")), strict=True)
    return [(x - 1) * s - 2 * p + d * (k - 1) + o + 1 for x, (k, s, p, o, d) in zip(size, rows, strict=True)]


@given(
    setting=settings_of_a_layer(),
    n=st.integers(1, 4),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_any_geometry(setting, n, dtype, seed):
    dims, size, options = setting
    assume(min(output_size(size, options)) >= 1)
    torch.manual_seed(seed)
    layer = TRANSPOSED[dims](**options).to(dtype)
    check(nn.Sequential(layer), losses_of(tensor(n, options["in_channels"], *size, seed=seed, dtype=dtype), seed))


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_output_padding_beyond_the_stride(padding, size):
    """Torch allows it below the dilation; the last places of the output then hold the bias alone."""
    layer = nn.ConvTranspose1d(2, 3, 2, stride=1, padding=padding, output_padding=3, dilation=4).double()
    check(nn.Sequential(layer), losses_of(tensor(3, 2, size)))


@pytest.mark.parametrize("wanted", [(9, 9), (10, 9), (10, 10)])
def test_output_size_as_an_argument(wanted):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)

        def forward(self, x):
            return self.up(x, output_size=wanted)

    check(Net().double(), losses_of(tensor(3, 2, 5, 5)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
def test_in_a_decoder(dtype, channels_last):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(6, 3, 3, padding=1, groups=3, bias=False),
    ).to(dtype)
    x = tensor(4, 3, 8, 8, dtype=dtype)
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    check(net, losses_of(x))


def test_before_a_batch_norm():
    net = nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU()).double()
    check(net, losses_of(tensor(4, 2, 4, 4)), frozen=True)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_one_parameter_frozen(trained):
    layer = nn.ConvTranspose2d(2, 3, 2).double()
    getattr(layer, "bias" if trained == "weight" else "weight").requires_grad_(False)
    check(nn.Sequential(layer), losses_of(tensor(3, 2, 4, 4)))


def test_called_twice_with_different_sizes():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 3, 3, stride=2, padding=1)

        def forward(self, x):
            return self.up(torch.tanh(self.up(x))).flatten(1)

    check(Pyramid().double(), losses_of(tensor(3, 3, 3, 4)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_decoder_that_shares_the_encoders_weight(dtype):
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Conv2d(2, 5, 3, stride=2, padding=1)
            self.up = nn.ConvTranspose2d(5, 2, 3, stride=2, padding=1)
            self.up.weight = self.down.weight

        def forward(self, x):
            return self.up(torch.tanh(self.down(x)))

    check(Autoencoder().to(dtype), losses_of(tensor(4, 2, 7, 7, dtype=dtype)))


def test_float16_scales_the_factor_that_carries_the_loss_scale():
    """The output's gradient takes the weights, though here it is the larger factor; inputs would vanish."""
    layer = nn.ConvTranspose1d(1, 3, 2)
    x, gy = torch.full((2, 1, 2), 1e-3).half(), torch.full((2, 3, 3), 100.0).half()
    term = engm.rules.conv.ConvTransposeRule().terms(layer, x, gy, None, ("weight",))["weight"]
    weights = torch.full((2,), 1e-4)
    want = torch.nn.grad.conv1d_weight(gy.float(), (1, 3, 2), x.float()) * 1e-4
    torch.testing.assert_close(term.weighted_sum(weights).float(), want, rtol=2e-3, atol=0)


def test_explained_with_both_forms():
    rows = engm.explain(
        nn.Sequential(nn.ConvTranspose2d(4, 8, 3, stride=2, dilation=2)), torch.randn(2, 4, 5, 5)
    ).layers
    assert rows[0].form in ("direct", "gram")
    assert rows[0].direct_flops > 0
    assert rows[0].gram_flops > 0
