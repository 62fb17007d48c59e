"""``examples/from_opacus.py``: Opacus' ghost clipping without noise is ENGM, but for a constant in its denominator."""

from __future__ import annotations

import copy
import re
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import engm

pytest.importorskip("opacus")

from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule
from opacus.validators.errors import UnsupportedModuleError

EXAMPLE = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "from_opacus.py"))
Problem = tuple[nn.Module, DataLoader[tuple[Tensor, ...]]]
TINY = 1e-6  # opacus/grad_sample/grad_sample_module_fast_gradient_clipping.py, get_clipping_coef

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook"),
]


def opacus_weights(norms: Tensor, alpha: float) -> Tensor:
    return (alpha / (norms + TINY)).clamp(max=1)


def problem(
    n: int, size: int, channels: int, batches: int, seed: int
) -> tuple[nn.Module, DataLoader[tuple[Tensor, ...]]]:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 2 * channels, 3, padding=1, stride=2), nn.GroupNorm(2, 2 * channels), nn.Tanh(),
        nn.Flatten(2), nn.Linear((size + 1) // 2 * ((size + 1) // 2), 5), nn.LayerNorm(5), nn.Flatten(),
        nn.Linear(10 * channels, 3),
    )  # fmt: skip
    x = torch.randn(n * batches, 2, size, size, dtype=torch.float64)
    return net.double(), DataLoader(TensorDataset(x, torch.randint(3, (n * batches,))), batch_size=n)


problems = st.builds(
    problem, st.integers(1, 7), st.integers(3, 9), st.integers(1, 3), st.integers(1, 4), st.integers(0, 999)
)


def greatest(gradients: list[Tensor]) -> float:
    return max(gradient.abs().max().item() for gradient in gradients)


@settings(max_examples=10)
@given(drawn=problems, max_grad_norm=st.floats(0.05, 20.0))
def test_gradients_are_the_same_to_rounding(drawn: Problem, max_grad_norm: float) -> None:
    """Each trains a whole run, so that an error in any step would be in all that follow."""
    net, loader = drawn
    theirs = EXAMPLE["with_opacus"](copy.deepcopy(net), loader, max_grad_norm)
    ours = EXAMPLE["with_engm"](copy.deepcopy(net), loader, max_grad_norm, weigh=opacus_weights)
    assert len(ours) == len(theirs) == len(loader)
    for (norms, gradients), (expected_norms, expected) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(norms, expected_norms, rtol=1e-9, atol=1e-12)
        for gradient, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-10 * greatest(expected))


@settings(max_examples=10)
@given(drawn=problems, max_grad_norm=st.floats(0.05, 20.0))
def test_engms_own_weights_differ_by_the_constant(drawn: Problem, max_grad_norm: float) -> None:
    net, loader = drawn
    ((norms, expected), *_) = EXAMPLE["with_opacus"](copy.deepcopy(net), loader, max_grad_norm)
    ((_, gradients), *_) = EXAMPLE["with_engm"](copy.deepcopy(net), loader, max_grad_norm)
    bound = max_grad_norm * TINY / norms.min().item()  # each clipped gradient is as long as that, at most
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=bound + 1e-12)


def test_what_the_page_says_of_opacus() -> None:
    """Batch norm and layers used twice are refused by Opacus and measured by engm."""

    def private(net: nn.Module) -> None:
        loader = DataLoader(TensorDataset(torch.randn(4, 3), torch.randint(3, (4,))), batch_size=4)
        model, _, criterion, loader = PrivacyEngine().make_private(
            module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), data_loader=loader, noise_multiplier=0.0,
            max_grad_norm=1.0, criterion=nn.CrossEntropyLoss(), grad_sample_mode="ghost", poisson_sampling=False,
        )  # fmt: skip
        for x, y in loader:
            criterion(model(x), y).backward()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    private(nn.Linear(3, 3))
    with pytest.raises(UnsupportedModuleError, match="BatchNorm"):
        private(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    with pytest.raises(NotImplementedError, match="Parameter tying is not supported"):
        private(Twice())
    assert list(GradSampleModule(nn.Linear(3, 3)).state_dict()) == ["_module.weight", "_module.bias"]
    for net in (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), Twice()):
        model = engm.GradNormModule(net.double())
        x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(3, (4,))
        report = engm.verify(model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none"), (x, y))
        assert report.passed


def test_opacus_takes_every_padding_for_zeros() -> None:
    """This is why the page says that Opacus' norms are wrong there."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(75, 3)).double()
    x, y = torch.randn(4, 2, 5, 5, dtype=torch.float64), torch.randint(3, (4,))
    model = engm.GradNormModule(net)
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    norms, exact = engm.per_example_grad_norms(model, losses), engm.naive_grad_norms(model, losses)
    torch.testing.assert_close(norms, exact, rtol=1e-9, atol=0)
    theirs = GradSampleModule(net)
    nn.functional.cross_entropy(theirs(x), y).backward()
    samples = [parameter.grad_sample.flatten(1).norm(dim=1) for parameter in theirs.parameters()]
    assert (torch.stack(samples).norm(dim=0) / exact - 1).abs().max() > 1e-3


def test_the_script_compares(capsys: pytest.CaptureFixture[str]) -> None:
    EXAMPLE["main"]()
    apart = re.findall(r"norms differ by (\S+), gradient by (\S+)", capsys.readouterr().out)
    assert len(apart) == 6
    assert all(float(each) < 1e-5 for pair in apart for each in pair)
