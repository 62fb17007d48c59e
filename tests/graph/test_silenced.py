"""What all examples share and a factor of zero keeps from all of them: ``losses + 0 * unused.sum()``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import per_example_gradients, relative, trained
from torch import Tensor, nn

import engm

WAYS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "a head that is not used": lambda h, aside, by: by * aside.sum(),
    "features that are used as well": lambda h, aside, by: by * h.mean(),
    "both": lambda h, aside, by: by * (h.sum() + aside.square().sum()),
    "one after another": lambda h, aside, by: (by * h.sum()).reshape(1).expand(3).tanh().sum(),
    "a mask": lambda h, aside, by: (aside * torch.full_like(aside, by)).sum(),
    "dead units": lambda h, aside, by: (h.mean() - (1e9 if by == 0 else -1e9)).relu(),
    "a matrix of all pairs": lambda h, aside, by: by * (h @ h.T).sum(),
}
WITHOUT_ASIDE = ("features that are used as well", "one after another", "dead units", "a matrix of all pairs")


class Net(nn.Module):
    """Two layers, and one aside."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.aside = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(4, 5)
        self.norm = nn.LayerNorm(6) if norm else nn.Identity()
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.norm(self.first(x)))
        return self.last(h), h, self.aside(x)


def losses_of(model: nn.Module, x: Tensor, way: str, by: float) -> Tensor:
    out, h, aside = model(x)
    losses = F.cross_entropy(out, torch.arange(len(x)) % 3, reduction="none")
    return losses + WAYS[way](h, aside, by)


@given(st.sampled_from(sorted(WAYS)), st.integers(1, 9), st.booleans(), st.integers(0, 2**20))
def test_examples_do_not_meet_in_what_is_multiplied_by_zero(way: str, n: int, norm: bool, seed: int) -> None:
    torch.manual_seed(seed)
    net = Net(norm)
    model = engm.GradNormModule(net)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.5)
    for count in (n, n, n + 1):
        x = torch.randn(count, 4, dtype=torch.float64)
        exact = per_example_gradients(losses_of(net, x, way, 0.0), trained(net))
        stats = opt.backward(losses_of(model, x, way, 0.0))
        assert relative(stats.norms, exact.norms) <= 1e-12
        expected = dict(zip(trained(net), exact.mean((0.5 / exact.norms).clamp(max=1)), strict=True))
        for name, parameter in net.named_parameters():
            if name.startswith("aside") and way in WITHOUT_ASIDE:
                assert parameter.grad is None
            else:
                assert relative(parameter.grad, expected[name]) <= 1e-12
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("way", sorted(WAYS))
def test_and_are_refused_as_soon_as_they_meet(way: str) -> None:
    torch.manual_seed(0)
    model = engm.GradNormModule(Net())
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.5)
    x = torch.randn(5, 4, dtype=torch.float64)
    opt.backward(losses_of(model, x, way, 0.0))
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with pytest.raises(engm.checks.RefusedError, match="influences the losses of other examples"):
        opt.backward(losses_of(model, x, way, 0.3))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None if name not in before else torch.equal(parameter.grad, before[name])
    opt.zero_grad()
    opt.backward(losses_of(model, x, way, 0.0))  # and go on where they do not


@pytest.mark.parametrize("way", sorted(WAYS))
def test_or_computed_through_one_another(way: str) -> None:
    torch.manual_seed(0)
    net = Net()
    model = engm.GradNormModule(net, coupled="exact")
    for by in (0.0, 0.3, 0.0, 0.0, 0.3, 0.3):
        x = torch.randn(5, 4, dtype=torch.float64)
        exact = per_example_gradients(losses_of(net, x, way, by), trained(net))
        assert relative(engm.per_example_grad_norms(model, losses_of(model, x, way, by)), exact.norms) <= 1e-12
