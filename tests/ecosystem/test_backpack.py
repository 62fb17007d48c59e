"""What docs/from_backpack.md and docs/from_torch_func.md say of BackPACK and torch.func, on the installed versions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engm

N = 5


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


def exact(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model = engm.GradNormModule(copy.deepcopy(net))
    losses = F.cross_entropy(model(x), y, reduction="none")
    norms = engm.per_example_grad_norms(model, losses)
    torch.testing.assert_close(norms, engm.naive_grad_norms(model, losses), rtol=1e-10, atol=1e-12)
    return norms


def by_backpack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Norms by ``BatchL2Grad``; a parameter that it left out counts as nothing."""
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import BatchL2Grad

    extended = backpack.extend(copy.deepcopy(net))
    with backpack.backpack(BatchL2Grad()):
        F.cross_entropy(extended(x), y, reduction="sum").backward()
    return sum(p.batch_l2 for p in extended.parameters() if hasattr(p, "batch_l2")).sqrt()


def by_vmap(net: nn.Module, x: Tensor, y: Tensor, **options: str) -> Tensor:
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(net, (parameters, buffers), (image[None],))
        return F.cross_entropy(logits, label[None])

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), **options)(parameters, x, y)
    return torch.stack([g.flatten(1).square().sum(1) for g in found.values()]).sum(0).sqrt()


def head(net: nn.Module) -> nn.Sequential:
    return nn.Sequential(net, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 4, 6, 6, dtype=torch.float64), torch.randint(3, (N,))


def made(net: nn.Module, x: Tensor) -> nn.Sequential:
    whole = head(net).double()
    with torch.no_grad():
        whole(x)
    return whole


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_all_three_agree_where_all_can(batch: tuple[Tensor, Tensor]) -> None:
    net = made(nn.Conv2d(4, 5, 3, padding=1), batch[0])
    expected = exact(net, *batch)
    torch.testing.assert_close(by_backpack(net, *batch), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_vmap(net, *batch), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect")],
    ids=["groups", "padding"],
)
def test_convolutions_that_batch_l2_grad_gets_wrong(layer: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    net = made(layer, batch[0])
    expected = exact(net, *batch)
    assert ((by_backpack(net, *batch) - expected).abs() / expected).max() > 0.01
    torch.testing.assert_close(by_vmap(net, *batch), expected, rtol=1e-10, atol=1e-12)


def test_a_layer_that_is_called_twice() -> None:
    net, x, y = Twice().double(), torch.randn(N, 6, dtype=torch.float64), torch.randint(6, (N,))
    with pytest.raises(AttributeError, match="has no attribute 'output'"):
        by_backpack(net, x, y)
    torch.testing.assert_close(by_vmap(net, x, y), exact(net, x, y), rtol=1e-10, atol=1e-12)


def test_layers_that_backpack_leaves_out_with_a_warning(batch: tuple[Tensor, Tensor]) -> None:
    net = made(nn.GroupNorm(2, 4), batch[0])
    with pytest.warns(UserWarning, match="does not have an extension for Module"):
        found = by_backpack(net, *batch)
    assert (found < exact(net, *batch)).all()


def test_batch_norm_in_training_mode(batch: tuple[Tensor, Tensor]) -> None:
    net = made(nn.BatchNorm2d(4), batch[0])
    with pytest.raises(NotImplementedError, match="BatchNorm module in training mode"):
        by_backpack(net, *batch)
    with pytest.raises(RuntimeError, match="in-place operation"):
        by_vmap(net, *batch)
    model = engm.GradNormModule(net, batch_norm="exact")
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    norms = engm.per_example_grad_norms(model, losses)
    torch.testing.assert_close(norms, engm.naive_grad_norms(model, losses), rtol=1e-10, atol=1e-12)


def test_dropout_and_numbers_read_from_the_data(batch: tuple[Tensor, Tensor]) -> None:
    net = made(nn.Dropout(0.5), batch[0])
    with pytest.raises(RuntimeError, match="randomness"):
        by_vmap(net, *batch)
    assert by_vmap(net, *batch, randomness="different").isfinite().all()

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.abs().max().item() > 1 else x

    with pytest.raises(RuntimeError, match="item"):
        by_vmap(made(Scaled(), batch[0]), *batch)
    assert exact(made(Scaled(), batch[0]), *batch).isfinite().all()
