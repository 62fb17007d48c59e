"""Weighted sums of many terms in groups: the same sums however they are grouped, and nothing held that is used."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from engm import ops
from engm.terms import (
    ConvFactors,
    ConvGeometry,
    LinearFactors,
    PerExampleGradient,
    Term,
    conv_weight_gradient,
    weighted_sums,
)

N = 5
SAME = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)


class Doubled(Term):
    """A user's own term."""

    def __init__(self, gradient):
        self.gradient = gradient

    def weighted_sum(self, weights):
        return 2 * torch.einsum("n,n...->...", weights, self.gradient)


def terms_and_sums(weights):
    """Terms of every kind, either factor the smaller, and the sums of their per-example gradients."""
    whole, own = torch.randn(N, 4, 3), torch.randn(N, 6)
    yield PerExampleGradient(whole), torch.einsum("n,nij->ij", weights, whole)
    for p, d in ((4, 9), (9, 4)):
        a, b = torch.randn(N, 7, p), torch.randn(N, 7, d)
        yield LinearFactors(a, b), torch.einsum("n,ntd,ntp->dp", weights, b, a)
    yield Doubled(own), 2 * weights @ own
    for channels, rows in ((3, 8), (8, 3)):
        x, gy = torch.randn(N, channels, 6, 6), torch.randn(N, rows, 6, 6)
        want = torch.nn.grad.conv2d_weight(x, (rows, channels, 3, 3), gy * weights[:, None, None, None], padding=1)
        yield ConvFactors(x, gy, SAME), want


@pytest.mark.parametrize("scaled_at_once", [0, 1000, 1 << 20])
def test_sums_do_not_depend_on_the_groups(scaled_at_once):
    weights = torch.rand(N)
    terms, want = zip(*terms_and_sums(weights), strict=True)
    keys = [torch.empty(0) for _ in terms]
    items = list(zip(keys, terms, strict=True))
    got = dict(weighted_sums(items, weights, scaled_at_once))
    assert items == []
    for key, sums in zip(keys, want, strict=True):
        torch.testing.assert_close(got[key], sums)


def test_one_call_of_either_operator_where_all_fits(monkeypatch):
    calls = []
    for name in ("scale_examples", "weighted_sums"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, op=op, name=name: calls.append(name) or op(*args))
    weights = torch.rand(N)
    items = [(torch.empty(0), term) for term, _ in terms_and_sums(weights)]
    list(weighted_sums(items, weights, 1 << 20))
    assert sorted(calls) == ["scale_examples", "weighted_sums"]


def test_terms_are_let_go_as_they_are_used():
    linear = [LinearFactors(torch.randn(N, 7, 4), torch.randn(N, 7, 9)) for _ in range(3)]
    kept = [weakref.ref(term) for term in linear]
    items = [(torch.empty(0), term) for term in linear]
    linear.clear()
    sums = weighted_sums(items, torch.rand(N), 0)
    next(sums), next(sums)
    gc.collect()
    assert [ref() is None for ref in kept] == [True, True, False]


def test_float16_backprops_are_scaled_even_if_they_are_larger():
    """Backprops carry the loss scale; activations times a small weight would vanish."""
    a, b = torch.full((2, 1, 3), 1e-3).half(), torch.full((2, 1, 5), 100.0).half()
    got = LinearFactors(a, b).weighted_sum(torch.full((2,), 1e-4))
    want = F.linear(b.float().squeeze(1).t(), a.float().squeeze(1).t()) * 1e-4
    torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=0)


@pytest.mark.parametrize("at_most", [0, 1 << 40])
@pytest.mark.parametrize(
    ("shape", "rows", "geometry"),
    [
        ((N, 4, 9), 6, ConvGeometry((3,), (2,), (1,), (1,), 2)),
        ((N, 4, 7, 6), 6, ConvGeometry((3, 2), (2, 1), (2, 0), (1, 2), 1)),
        ((N, 4, 1, 1), 4, ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 4)),
        ((N, 2, 5, 4, 4), 3, ConvGeometry((2, 3, 1), (1, 2, 1), (0, 1, 0), (1, 1, 1), 1)),
    ],
)
def test_a_small_convolution_is_summed_as_one_example(monkeypatch, at_most, shape, rows, geometry):
    monkeypatch.setattr("engm.terms.convolution.MOST_IN_A_STACK", at_most)
    stacks = []
    grads = ops.conv_grads
    monkeypatch.setattr(ops, "conv_grads", lambda x, *others: stacks.append(len(x)) or grads(x, *others))
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(rows, shape[1] // geometry.groups, *geometry.kernel_size, dtype=torch.float64)
    weight.requires_grad_()
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(shape) - 3]
    outputs = conv(x, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    gy = torch.randn_like(outputs)
    (want,) = torch.autograd.grad(outputs, weight, gy)
    torch.testing.assert_close(conv_weight_gradient(x, gy, geometry), want, rtol=1e-13, atol=1e-13)
    assert stacks == ([1] if at_most and len(shape) < 5 else [])


@pytest.mark.parametrize(("positions", "most", "kept"), [(16, 1 << 18, True), (15, 1 << 18, False), (16, 1, False)])
def test_small_gradients_are_formed_once(monkeypatch, positions, most, kept):
    monkeypatch.setattr("engm.terms.factors.KEPT_ELEMENTS", most)
    a, b = (torch.randn(N, positions, size, dtype=torch.float64) for size in (40, 50))
    x, gy = (torch.randn(N, channels, positions, dtype=torch.float64) for channels in (30, 40))
    same = ConvGeometry((3,), (1,), (1,), (1,), 1)
    weights = torch.rand(N, dtype=torch.float64)
    for term in (LinearFactors(a, b), ConvFactors(x, gy, same)):
        compact = term.compact()
        assert isinstance(compact, PerExampleGradient) is kept
        torch.testing.assert_close(compact.squared_norm(), term.squared_norm())
        torch.testing.assert_close(compact.weighted_sum(weights), term.weighted_sum(weights))
