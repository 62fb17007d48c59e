"""Whose a row is behind an operator of a region's backward pass: the rules, held against what the operator does.

The oracle changes the gradients of one example after the other, and the data too. Elements of the result that change
with an example's gradients have to be that example's, whatever the data.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from engm.graph.regions import MIXED, Reading
from engm.torch_internals import RegionBackward

pytestmark = pytest.mark.torch_insides

aten = torch.ops.aten
N = 3


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def places(*shape: int, most: int = 2) -> Tensor:
    return torch.randint(most, shape)


Function = Callable[..., Tensor]
Case = tuple[Function, Callable[[], tuple[Tensor, ...]]]

# Of a gradient [N, 2, 4] and data that are drawn.
TOLD: dict[str, Case] = {
    "elementwise": (lambda g, x: torch.where(x > 0, g, -g) * x + g.sin(), lambda: (drawn(N, 2, 4),)),
    "broadcast": (lambda g, x: g[:, :1] * x, lambda: (drawn(2, 4),)),
    "repeated": (lambda g: g.unsqueeze(1).expand(-1, 5, -1, -1).repeat(1, 1, 2, 1), lambda: ()),
    "time first": (lambda g: g.transpose(0, 1).reshape(2 * N, 4).permute(1, 0), lambda: ()),
    "windows": (lambda g: g.view(N, 2, 2, 2).permute(0, 2, 1, 3).reshape(-1, 2).view(N * 2, 4), lambda: ()),
    "heads": (lambda g: g.view(N, 2, 2, 2).transpose(1, 2).reshape(N * 2, 2, 2), lambda: ()),
    "rolled over the batch": (lambda g: torch.cat([g.roll(1, 0), g.flip(0)], 1), lambda: ()),
    "cut": (lambda g: torch.stack([*g[1:].split([1, 1]), g[:1]]).squeeze(1), lambda: ()),
    "cut, backward": (
        lambda g: (
            aten.slice_backward(g, [N, 5, 4], 1, 1, 3, 1).sum(1) + aten.select_backward(g[:, 0], [2, N, 4], 0, 1)[1]
        ),
        lambda: (),
    ),
    "diagonal": (lambda g: aten.diagonal_backward(g, [N, 2, 4, 4], 0, 2, 3).tril(), lambda: ()),
    "written into": (lambda g, x: x.slice_scatter(g, 1, 0, 2).select_scatter(g[:, 0], 1, 2), lambda: (drawn(N, 3, 4),)),
    "pixels": (lambda g: F.pixel_shuffle(g.view(N, 2, 2, 2).repeat(1, 2, 1, 1), 2).unbind(2)[1], lambda: ()),
    "padded": (lambda g: F.pad(g, (1, 0, 2, 1), value=3.0), lambda: ()),
    "sums": (lambda g: g.sum(1) + g.mean((1, 2), keepdim=True)[:, 0] + g.amax(2)[:, :1] + g.logsumexp(1), lambda: ()),
    "norm": (lambda g, x: g / (g * g).sum((1, 2), keepdim=True), lambda: (drawn(1),)),
    "softmax": (
        lambda g, y: aten._softmax_backward_data(g, y, 2, torch.float64).cumsum(1).softmax(-1),
        lambda: (drawn(N, 2, 4).softmax(2),),
    ),
    "log softmax": (
        lambda g, y: aten._log_softmax_backward_data(g, y, 1, torch.float64),
        lambda: (drawn(N, 2, 4).log_softmax(1),),
    ),
    "gathered in a row": (lambda g, i: g.gather(2, i), lambda: (places(N, 2, 6, most=4),)),
    "scattered in a row": (
        lambda g, i: torch.zeros(N, 5, 4, dtype=torch.float64).scatter_add(1, i, g),
        lambda: (places(N, 2, 4, most=5),),
    ),
    "linear": (lambda g, w: torch.mm(g.view(-1, 4), w).view(N, 2, 3), lambda: (drawn(4, 3),)),
    "from the left": (lambda g, w: torch.mm(w, g.permute(1, 2, 0).reshape(8, N)), lambda: (drawn(5, 8),)),
    "attention": (lambda g, k: torch.bmm(torch.bmm(g, k), g), lambda: (drawn(N, 4, 2),)),
    "added": (lambda g, k: torch.baddbmm(g, k, g, beta=2), lambda: (drawn(N, 2, 2),)),
    "fused attention": (
        lambda g, q, k, v: _attention(g.view(N, 2, 1, 4), q, k, v),
        lambda: (drawn(N, 2, 1, 4), drawn(N, 2, 3, 4), drawn(N, 2, 3, 4)),
    ),
    "convolution": (
        lambda g, x, w: aten.convolution_backward(
            g.repeat(1, 2, 1), x, w, [4], [1], [1], [1], False, [0], 2, [True, True, False]
        )[0],
        lambda: (drawn(N, 2, 4), drawn(4, 1, 3)),
    ),
    "layer norm": (
        lambda g, x, m, w: aten.native_layer_norm_backward(g, x, [4], m, m.exp(), w, w, [True, True, True])[0],
        lambda: (drawn(N, 2, 4), drawn(N, 2, 1), drawn(4)),
    ),
    "group norm": (
        lambda g, x, m, w: aten.native_group_norm_backward(g, x, m, m.exp(), w, N, 2, 4, 1, [True, True, True])[0],
        lambda: (drawn(N, 2, 4), drawn(N, 1), drawn(2)),
    ),
    "batch norm in evaluation mode": (
        lambda g, x, w, m: aten.native_batch_norm_backward(
            g, x, w, m, m.exp(), None, None, False, 1e-5, [True, True, True]
        )[0],
        lambda: (drawn(N, 2, 4), drawn(2), drawn(2)),
    ),
    "maxima": (
        lambda g, x, i: aten.max_pool2d_with_indices_backward(
            g.view(N, 2, 2, 2), x, [2, 2], [2, 2], [0, 0], [1, 1], False, i
        ),
        lambda: (x := drawn(N, 2, 4, 4), F.max_pool2d(x, 2, return_indices=True)[1]),
    ),
    "means": (
        lambda g, x: aten.avg_pool2d_backward(g.view(N, 2, 2, 2), x, [2, 2], [2, 2], [0, 0], False, True, None),
        lambda: (drawn(N, 2, 4, 4),),
    ),
    "targets": (
        lambda g, x, y: aten.nll_loss_backward(g[:, 0, 0], x, y, None, 0, -100, x.new_ones(())),
        lambda: (drawn(N, 4), places(N, most=4)),
    ),
    "squares": (lambda g, x: aten.mse_loss_backward(g, x, -x, 0), lambda: (drawn(N, 2, 4),)),
    "like a gradient": (lambda g, x: x.new_zeros(g.shape) + torch.zeros_like(g) + x * g, lambda: (drawn(N, 2, 4),)),
}

# What mixes examples, or may, by the data.
NOT_TOLD: dict[str, Case] = {
    "sum over the batch": (lambda g: g.sum(0), lambda: ()),
    "sum of all": (lambda g: g.sum(), lambda: ()),
    "centred": (lambda g: g - g.mean(0), lambda: ()),
    "neighbours": (lambda g, x: g + x * g.roll(1, 0), lambda: (drawn(1),)),
    "weights": (lambda g, x: torch.mm(g.view(-1, 4).t(), x), lambda: (drawn(2 * N, 3),)),
    "product over the batch": (lambda g, a: torch.mm(a, g.view(N, 8)), lambda: (drawn(N, N),)),
    "by index": (lambda g, i: g[i], lambda: (torch.randperm(N),)),
    "by narrow index": (lambda g, i: g.index_select(0, i), lambda: (torch.randperm(N).int(),)),
    "by index into": (lambda g, i: torch.zeros_like(g).index_put((i,), g), lambda: (torch.randperm(N),)),
    "gathered": (lambda g, i: g.gather(0, i), lambda: (places(N, 2, 4, most=N),)),
    "scattered": (lambda g, i: torch.zeros_like(g).scatter(0, i, g), lambda: (places(N, 2, 4, most=N),)),
    "a part scattered": (
        lambda g, i: torch.zeros_like(g).scatter_add(1, i, g),
        lambda: (places(N - 1, 2, 4),),
    ),
    "by mask": (lambda g, x: torch.where(x > 0, g, g.flip(0)), lambda: (drawn(N, 1, 1),)),
    "softmax over the batch": (lambda g: g.softmax(0), lambda: ()),
    "running": (lambda g: g.cumsum(0), lambda: ()),
    "layer norm over all": (
        lambda g, x, m: aten.native_layer_norm_backward(g, x, [N, 2, 4], m, m, None, None, [True, False, False])[0],
        lambda: (drawn(N, 2, 4), drawn(1, 1, 1)),
    ),
    "batch norm in training mode": (
        lambda g, x, m: aten.native_batch_norm_backward(
            g, x, None, None, None, m, m.exp(), True, 1e-5, [True, False, False]
        )[0],
        lambda: (drawn(N, 2, 4), drawn(2)),
    ),
    "reduced targets": (
        lambda g, x, y: aten.nll_loss_backward(g.sum(), x, y, None, 1, -100, x.new_ones(())),
        lambda: (drawn(N, 4), places(N, most=4)),
    ),
    "a sort": (lambda g: g.sort(0).values, lambda: ()),
    "clipped": (lambda g: g / g.norm().clamp(min=1), lambda: ()),
}


def _attention(g: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, out, logsumexp, 0.0, False)
    return torch.cat(list(parts), 2)


def state_behind(function: Function, given: tuple[Tensor, ...]) -> object:
    """What the rules say of the function's result, for a gradient whose examples lie along the first dimension."""
    traced = make_fx(function, tracing_mode="fake")(*given)
    gradient = next(node for node in traced.graph.nodes if node.op == "placeholder")
    (last,) = (node for node in traced.graph.nodes if node.op == "output")
    backward = RegionBackward(traced.graph, {gradient: 0}, {0: last.args[0]}, {})
    owners = torch.arange(1, N + 1, dtype=torch.int32).view(N, 1, 1).expand(given[0].shape)
    reading = Reading(backward, {0: owners})
    kept = reading.keeps([0])
    found = reading.states.get(last.args[0], MIXED)
    assert kept == isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("name", TOLD)
def test_owners_are_told(name):
    torch.manual_seed(0)
    function, data = TOLD[name]
    owners = state_behind(function, (drawn(N, 2, 4), *data()))
    assert isinstance(owners, Tensor)
    for _ in range(5):
        gradient, others = drawn(N, 2, 4), data()
        plain = function(gradient, *others)
        assert owners.shape == plain.shape
        touched = torch.zeros_like(owners, dtype=torch.bool)
        for example in range(N):
            changed = gradient.clone()
            changed[example] = drawn(2, 4)
            differs = function(changed, *others) != plain
            assert bool((owners[differs] == example + 1).all())
            touched |= differs
        assert bool(touched.any())


@pytest.mark.parametrize("name", NOT_TOLD)
def test_owners_are_not_told(name):
    torch.manual_seed(0)
    function, data = NOT_TOLD[name]
    assert state_behind(function, (drawn(N, 2, 4), *data())) is MIXED
