"""Terms of every kind, each with its own per-example gradients, which autograd forms one example at a time."""

import pytest
import torch
import torch.nn.functional as F
from oracle import relative, tensor

from engm.terms import (
    BilinearFactors,
    ConvFactors,
    ConvGeometry,
    EmbeddingFactors,
    LinearFactors,
    LocalCorrection,
    MixedTerm,
    PerExampleGradient,
    Reshaped,
    Stacked,
    TiedTable,
)

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def gradients(shape, function, backprops):
    """``[n, *shape]``: of ``<function(weight, i), backprops[i]>``, one example at a time."""
    weight = tensor(*shape).requires_grad_()
    return torch.stack(
        [torch.autograd.grad((function(weight, i) * gy).sum(), weight)[0] for i, gy in enumerate(backprops)]
    )


def whole(n, seed=0):
    g = tensor(n, 4, 6, seed=seed)
    return PerExampleGradient(g), g


def linear(n, positions=3, seed=0, shape=(4, 6)):
    a, b = tensor(n, positions, shape[1], seed=seed), tensor(n, positions, shape[0], seed=seed + 1)
    return LinearFactors(a, b), gradients(shape, lambda w, i: a[i] @ w.t(), b)


def bilinear(n, positions=3, seed=0):
    x, y, b = (tensor(n, positions, size, seed=seed + size) for size in (2, 3, 4))
    return BilinearFactors(x, y, b), gradients((4, 2, 3), lambda w, i: F.bilinear(x[i], y[i], w), b)


def embedding(n, positions=3, seed=0, padding=-1, shape=(4, 6)):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(shape[0], (n, positions), generator=generator)
    b = tensor(n, positions, shape[1], seed=seed)
    want = gradients(shape, lambda w, i: F.embedding(indices[i], w, None if padding < 0 else padding), b)
    return EmbeddingFactors(indices, b, shape[0], padding), want


def tied(n, positions=3, seed=0, padding=-1, shape=(4, 6)):
    table, of_table = embedding(n, positions, seed, padding, shape)
    projection, of_projection = linear(n, positions + 1, seed, shape)
    return TiedTable(table, projection), of_table + of_projection


def mixed(n, seed=0):
    (first, of_first), (second, of_second) = linear(n, 3, seed), whole(n, seed)
    return MixedTerm([first, second]), of_first + of_second


def stacked(n, seed=0):
    (first, of_first), (second, of_second) = linear(n, 3, seed), linear(n, 2, seed + 5)
    return Stacked([first, second]), torch.stack([of_first, of_second], 1)


def reshaped(n, seed=0):
    term, want = embedding(n, 3, seed)
    return Reshaped(term, (2, 2, 6)), want.unflatten(1, (2, 2))


def convolution(n, dims=2, stride=1, seed=0, groups=1, transposed=False):
    geometry = ConvGeometry((2,) * dims, (stride,) * dims, (1,) * dims, (1,) * dims, groups)
    options = {"stride": stride, "padding": 1, "groups": groups}
    x = tensor(n, 2, *[4, 3, 3][:dims], seed=seed)
    apply = (TRANSPOSE if transposed else CONVOLVE)[dims]
    shape = (2, 4 // groups, *geometry.kernel_size) if transposed else (4, 2 // groups, *geometry.kernel_size)
    gy = tensor(*apply(x, tensor(*shape), **options).shape, seed=seed + 1)
    want = gradients(shape, lambda w, i: apply(x[i : i + 1], w, **options), gy.unsqueeze(1))
    if transposed:
        return ConvFactors(gy, x, geometry, transposed=True), want
    return ConvFactors(x, gy, geometry), want


KINDS = {
    "whole": whole,
    "linear": linear,
    "bilinear": bilinear,
    "embedding": embedding,
    "embedding with padding": lambda n, seed=0: embedding(n, padding=2, seed=seed),
    "tied": tied,
    "tied, large table": lambda n, seed=0: tied(n, padding=1, seed=seed, shape=(30, 6)),
    "mixed": mixed,
    "stacked": stacked,
    "reshaped": reshaped,
    "conv1d": lambda n, seed=0: convolution(n, 1, 2, seed),
    "conv2d": lambda n, seed=0: convolution(n, 2, 1, seed, groups=2),
    "conv3d": lambda n, seed=0: convolution(n, 3, 2, seed),
    "transposed": lambda n, seed=0: convolution(n, 2, 2, seed, transposed=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def assert_term(term, want):
    """Everything that a term can be asked for agrees with its own gradients."""
    n = len(want)
    weights = tensor(n, seed=7)
    assert term.examples == n
    assert relative(term.squared_norm(), want.flatten(1).square().sum(1)) <= 1e-9
    torch.testing.assert_close(term.weighted_sum(weights).view(want.shape[1:]), torch.tensordot(weights, want, 1))
    for rows in (slice(0, n), slice(1, 2), slice(n - 1, n)):
        torch.testing.assert_close(term.dense(rows), want[rows])


OF_ONE_SHAPE = {
    "whole": whole,
    "linear": linear,
    "embedding": embedding,
    "padded": lambda n, seed=0: embedding(n, padding=2, seed=seed),
    "mixed": mixed,
}


def correction(n, d, channels, own):
    return LocalCorrection(
        tensor(n, d, seed=1), tensor(*channels, seed=2), tensor(n, d, seed=3), tensor(d, *own, seed=4)
    )
