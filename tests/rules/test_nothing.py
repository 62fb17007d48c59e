"""Calls of layers on rows without elements: every rule gives gradients of zero, and does not stumble over a shape."""

import pytest
import torch
from oracle import tensor
from torch import nn

import engm

LAYERS = {
    "linear": (nn.Linear(4, 3), (2, 0, 4)),
    "bilinear": (nn.Bilinear(4, 4, 3), (2, 0, 4)),
    "layer norm": (nn.LayerNorm(4), (2, 0, 4)),
    "rms norm": (nn.RMSNorm(4), (2, 0, 4)),
    "prelu": (nn.PReLU(), (2, 0, 4)),
    "embedding": (nn.Embedding(4, 3), (2, 0)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_no_positions(name):
    layer, shape = LAYERS[name]
    net = nn.ModuleDict({"layer": layer, "own": nn.Linear(4, 1)}).double()
    x = torch.zeros(shape, dtype=torch.int64 if name == "embedding" else torch.float64)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = net

        def forward(self, x, y):
            out = self.parts["layer"](x, x) if name == "bilinear" else self.parts["layer"](x)
            return self.parts["own"](y)[:, 0] + out.flatten(1).sum(1)

    model = engm.GradNormModule(Net())
    y = tensor(2, 4)
    measured = engm.measure(model, model(x, y))
    expected = (y.square().sum(1) + 1).sqrt()
    torch.testing.assert_close(measured.norms, expected)


def test_a_module_of_its_own_parameters():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4).double())

        def forward(self, x):
            return x * self.gain

    model = engm.GradNormModule(Scaled())
    losses = model(torch.zeros(3, 0, 4).double()).flatten(1).sum(1)
    assert engm.measure(model, losses).norms.tolist() == [0, 0, 0]
