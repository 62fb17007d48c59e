"""Layers within what takes functions and traces them: the branches of ``torch.cond``, the steps of a scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import per_example_gradients, relative, tensor, trained
from torch import Tensor, nn

import engm

pytestmark = pytest.mark.torch_insides

scan = pytest.importorskip("torch._higher_order_ops.scan").scan


class Gain(nn.Module):
    """A layer without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Branches(nn.Module):
    """A layer of its own in one branch, the first layer again in the other."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 6), inner, nn.Linear(6, 4)
        self.double()

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = torch.cond(which, lambda h: torch.tanh(self.inner(h)), lambda h: torch.sin(self.first(h)), (h,))
        return self.last(h)


class Steps(nn.Module):
    """One layer, applied once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)
        self.double()

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.first(h) + x)
            return h, h.clone()

        return self.last(scan(step, torch.zeros_like(x[:, 0]), x.transpose(0, 1), dim=0)[0])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Branches(nn.Linear(6, 6)),
    "without a rule": lambda: Branches(Gain()),
    "convolution": lambda: Branches(nn.Conv1d(3, 3, 3, padding=1)),
    "scan": Steps,
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("compiler_in_use", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.filterwarnings("ignore")
def test_layers_in_branches_and_steps(network, compiler_in_use, monkeypatch):
    """Until something is compiled in a process other hooks capture than from then on."""
    monkeypatch.setattr("engm.module.dynamo_in_use", lambda: compiler_in_use)
    net = NETWORKS[network]()
    model = engm.GradNormModule(net)
    for step in range(2):  # torch traces the backward pass of a branch whenever it runs
        losses = model(tensor(2, 3, 6, seed=step), torch.tensor(step % 2 == 0)).square().flatten(1).sum(1)
        expected = per_example_gradients(losses, trained(net))
        assert relative(engm.per_example_grad_norms(model, losses), expected.norms) < 1e-9


@pytest.mark.filterwarnings("ignore")
def test_branches_in_a_compiled_region_are_refused():
    model = engm.GradNormModule(Branches(nn.Linear(6, 6)))
    model.compile(backend="aot_eager")
    losses = model(tensor(5, 3, 6), torch.tensor(True)).square().flatten(1).sum(1)
    with pytest.raises(RuntimeError, match=r"'inner\.\w+'.* a branch of torch\.cond"):
        engm.per_example_grad_norms(model, losses)
