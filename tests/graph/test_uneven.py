"""One example whose loss is many times those of all others: of their shares nothing is left in sums."""

import pytest
import torch
import torch.nn.functional as F
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


class Branches(nn.Module):
    """Four even branches, and one in which an example is many times as large: in its share of the loss, or its data."""

    def __init__(self, weight, by_data):
        super().__init__()
        self.branches, self.head = nn.ParameterList([torch.randn(6, 5) for _ in range(4)]), nn.Linear(5, 1)
        self.weight, self.gain, self.of, self.by_data = (
            nn.Parameter(torch.randn(6, 5)),
            torch.rand(6, 5) > 0.3,
            weight,
            by_data,
        )

    def forward(self, x, sizes):
        kept = self.gain.to(x.dtype)
        even = sum(F.linear(x, weight * kept).tanh().sum(1) for weight in self.branches) + self.head(x)[:, 0]
        h = F.linear(x * sizes[:, None], self.of(self.weight, kept)) if self.by_data else None
        return 1e-2 * even + (
            F.linear(x, self.of(self.weight, kept)).tanh().sum(1) * sizes if h is None else h.sin().sum(1)
        )


COMPUTED = {
    "masked": lambda weight, kept: weight * kept,
    "normalised": lambda weight, kept: F.normalize(weight * kept, dim=1),
    "in two steps": lambda weight, kept: (weight.exp() * kept).reshape(5, 6).t().contiguous().view(6, 5),
}


@pytest.mark.parametrize("by_data", [False, True])
@pytest.mark.parametrize(
    ("dtype", "ratio"), [(torch.float64, 1e18), (torch.float64, 1e25), (torch.float32, 1e8), (torch.float32, 1e11)]
)
@pytest.mark.parametrize("name", COMPUTED)
def test_norms_where_one_branch_alone_is_uneven(name, dtype, ratio, by_data):
    torch.manual_seed(0)
    model = engm.GradNormModule(Branches(COMPUTED[name], by_data).to(dtype))
    for seed, large in enumerate([ratio, 1.0, ratio, 1.0]):
        x = torch.randn(N, 5, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        sizes = torch.ones(N, dtype=dtype)
        sizes[seed % N] = large
        values = model(x, sizes)
        expected = per_example_gradients(values, trained(model)).norms
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]
        norms = engm.per_example_grad_norms(model, values)
        torch.testing.assert_close(norms.double(), expected.double(), rtol=tolerance, atol=0)


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float64, 1e18), (torch.float32, 1e9)])
def test_an_influence_in_one_branch_alone_is_refused(dtype, ratio):
    """What the large example is influenced by hides what it influences."""
    torch.manual_seed(0)
    sizes = torch.tensor([ratio, 1, 1, 1], dtype=dtype)

    def run(s, h):
        return s.layer(h).tanh() + s.layer((h - h.mean(0)).relu()) * sizes[:, None]

    model = engm.GradNormModule(Network(run).to(dtype))
    with pytest.raises(RefusedError, match="influence"):
        engm.per_example_grad_norms(model, model(torch.randn(N, 6, dtype=dtype)).square().sum(1))
