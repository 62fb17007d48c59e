"""Activations with trained slopes against the oracle."""

import pytest
import torch
from engine_checks import check
from hypothesis import given
from hypothesis import strategies as st
from oracle import dtype_of, random_losses, tensor
from torch import nn

pytestmark = pytest.mark.torch_insides


def losses_of(x, seed=0):
    return lambda net: random_losses(net(x.to(dtype_of(net))), seed)


@given(
    n=st.integers(1, 5),
    rest=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    by_channel=st.booleans(),
    between=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_any_shape(n, rest, by_channel, between, dtype, seed):
    torch.manual_seed(seed)
    layer = nn.PReLU(rest[0] if by_channel else 1, init=0.3)
    layers = [nn.Linear(rest[-1], rest[-1]), layer, nn.Linear(rest[-1], 2)] if between else [layer]
    check(nn.Sequential(*layers).to(dtype), losses_of(tensor(n, *rest, seed=seed, dtype=dtype), seed))


def test_one_number_an_example():
    x, c = tensor(4), tensor(4, seed=1)
    check(nn.Sequential(nn.PReLU()).double(), lambda net: net(x.to(dtype_of(net))) * c)


@pytest.mark.parametrize("channels_last", [False, True])
def test_between_convolutions(channels_last):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Conv2d(4, 2, 3), nn.PReLU()).double()
    x = tensor(3, 3, 7, 7)
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    check(net, losses_of(x))


def test_called_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.slope = nn.Linear(4, 4), nn.PReLU(4)

        def forward(self, x):
            return self.slope(self.fc(self.slope(x)))

    check(Net().double(), losses_of(tensor(3, 4)))


def test_zero_passes_no_gradient_to_the_slope():
    x = torch.zeros(3, 4, dtype=torch.float64)
    assert float(check(nn.Sequential(nn.PReLU(4)).double(), losses_of(x)).norms.max()) == 0
