"""One example whose loss is many times those of all others: of their shares nothing is left in sums."""

import pytest
import torch
from oracle import per_example_gradients, trained
from torch import nn

import engm
from engm.checks import RefusedError

pytestmark = pytest.mark.torch_insides
N = 4


class Network(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run, self.layer = run, nn.Linear(6, 6)
        self.weight, self.gain = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.run(self, self.layer(x))


NETWORKS = {
    "a sum of views": lambda s, h: h @ (s.weight.expand(6, 6) + s.gain[:, None]),
    "a gain beside a constant": lambda s, h: h * (s.gain.exp() * torch.ones(6, dtype=h.dtype)),
    "a gain beside a constant, row by row": lambda s, h: torch.stack(
        [
            torch.stack([s.layer(row) for row in example])
            for example in h * (s.gain.exp() * torch.ones(6, dtype=h.dtype))
        ]
    ),
    "a position table": lambda s, h: s.layer(h + (s.weight * torch.linspace(0, 1, 3, dtype=h.dtype)[:, None]).sin()),
}
TYPES = [(torch.float64, None, 1e18), (torch.float32, None, 1e9), (torch.float32, torch.bfloat16, 1e6)]


def losses(model, dtype, autocast, ratio, seed):
    x = torch.randn(N, 3, 6, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    factors = torch.ones(N, dtype=dtype)
    factors[seed % N] = ratio
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    return factors * y.to(dtype).square().flatten(1).sum(1)


@pytest.mark.parametrize(("dtype", "autocast", "ratio"), TYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_norms_of_the_others(name, dtype, autocast, ratio):
    torch.manual_seed(0)
    model = engm.GradNormModule(Network(NETWORKS[name]).to(dtype))
    for seed, large in enumerate([ratio, ratio, 1.0]):
        values = losses(model, dtype, autocast, large, seed)
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}[dtype] if autocast is None else 0.02
        expected = per_example_gradients(values, trained(model)).norms
        norms = engm.per_example_grad_norms(model, values)
        torch.testing.assert_close(norms.double(), expected.double(), rtol=tolerance, atol=0)


@pytest.mark.parametrize(("dtype", "autocast", "ratio"), TYPES)
def test_an_influence_on_the_others_is_refused(dtype, autocast, ratio):
    torch.manual_seed(0)
    model = engm.GradNormModule(Network(lambda s, h: s.layer((h - h.mean(0)).relu())).to(dtype))
    values = losses(model, dtype, autocast, ratio, 0)
    with pytest.raises(RefusedError, match="influence"):
        engm.per_example_grad_norms(model, values)
