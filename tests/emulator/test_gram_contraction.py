"""The contraction of two Gram matrices against float64, by itself and behind the operators."""

import ctypes

import pytest
import torch
from emulator.build import CSRC, EMULATOR, build_library, kernel_unit, runtime_units
from emulator.gram_library import PRECISIONS, Library
from hypothesis import given
from hypothesis import strategies as st

from engm import reference

precisions = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS.keys())
POSITIONS = st.one_of(st.integers(1, 20), st.integers(60, 70), st.integers(120, 262))


@pytest.fixture(scope="module")
def library():
    kernels = sorted((CSRC / "cuda").glob("gram_*.cu"))
    units = [kernel_unit(path) for path in (EMULATOR / "gram_cases.cpp", *kernels)] + runtime_units()
    return Library(ctypes.CDLL(str(build_library("gram_cases", units, with_torch=False))))


def grams(n, positions, width, mean=0.0):
    """Gram matrices of random rows, in float64."""
    rows = torch.randn(n, positions, width, dtype=torch.float64) + mean
    return rows @ rows.transpose(1, 2)


@precisions
@given(n=st.integers(1, 4), positions=POSITIONS, widths=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_drawn_shapes(library, precision, n, positions, widths):
    library.check_contraction(*(grams(n, positions, width) for width in widths), precision)


@precisions
@pytest.mark.parametrize("positions", [1, 2, 4, 8, 9, 63, 64, 65, 128, 196, 197, 256])
def test_every_pair_counts_once(library, precision, positions):
    """Entries of one matrix that differ, ones in the other: what is left out or counted twice shows."""
    ranks = torch.arange(positions * positions, dtype=torch.float64).view(1, positions, positions) % 1021 + 1
    p = ranks.triu() + ranks.triu(1).transpose(1, 2)
    out, reliable = library.contract(p, torch.ones_like(p), precision)
    torch.testing.assert_close(out.double(), p.sum((1, 2)), rtol=3e-7, atol=0)
    assert reliable == [1]


@precisions
def test_cancellation_is_handed_back(library, precision):
    """Backprops that nearly sum to zero over the positions, and large means: every ratio around the limit."""
    n, positions = 24, 30
    p = grams(n, positions, 16, mean=1e3)
    b = torch.randn(n, positions, 12, dtype=torch.float64)
    b -= b.mean(1, keepdim=True) * (1 - torch.logspace(-4, 0, n, dtype=torch.float64).view(-1, 1, 1))
    reliable = library.check_contraction(p, b @ b.transpose(1, 2), precision)
    assert set(reliable) == {0, 1}


@precisions
def test_nothing_is_left_of_zero(library, precision):
    p, q = torch.zeros(2, 9, 9), torch.zeros(2, 9, 9)
    p[0] = 1
    out, reliable = library.contract(p, q, precision)
    assert (out.tolist(), reliable) == ([0, 0], [1, 1])
    out, reliable = library.contract(p, -p, precision)  # a negative sum, which rounding alone can make
    assert (out.tolist(), reliable) == ([0, 0], [0, 1])


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@precisions
def test_what_is_not_finite_is_left_to_the_direct_form(library, precision, value):
    p, q = grams(3, 70, 9), grams(3, 70, 7)
    p[1, 3, 69] = value
    out, reliable = library.contract(p, q, precision)
    assert out[[0, 2]].isfinite().all()
    assert reliable == [1, 0, 1]


@precisions
@pytest.mark.parametrize("positions", [20, 150])
def test_every_schedule_gives_the_same_bits(library, precision, positions, monkeypatch):
    results = set()
    for seed in range(6):
        monkeypatch.setenv("ENGM_EMULATOR_SEED", str(seed))
        torch.manual_seed(1)
        out, _ = library.contract(grams(1, positions, 9), grams(1, positions, 7), precision)
        results.add(out.item())
    assert len(results) == 1


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_layers_in_stretches_of_examples(emulated, dtype):
    """More examples than the workspace holds at once: 512 positions take 2 MiB an example, or 4 in float64."""
    n, positions = 150, 512
    a = torch.randn(n, positions, 3).to(dtype)
    b = torch.randn(n, positions, 2).to(dtype)
    b[70] = 0
    got = emulated.linear_norm_sq(a, b, "gram")
    want = reference.linear_norm_sq(a.double(), b.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-12 if dtype == torch.float64 else 1e-4, atol=0)


PATCHES = {  # sizes of the map, kernel, stride
    "a line": ((21,), (4,), (4,)),
    "squares, pixels left over": ((9, 11), (2, 3), (2, 3)),
    "rows of one pixel, with gaps": ((8, 12), (1, 4), (3, 4)),
    "a volume": ((4, 6, 5), (2, 2, 2), (2, 2, 2)),
    "the whole map": ((4, 4), (4, 4), (4, 4)),
}


@pytest.mark.parametrize("form", ["auto", "direct", "gram"])
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("case", PATCHES)
def test_patches_that_do_not_overlap(emulated, case, last, form):
    """They are copied and then rows of a linear layer; pixels that no patch reads are NaN here.

    Small integers are exact in TF32, which torch allows for convolutions.
    """
    size, kernel, stride = PATCHES[case]
    out = [(s - k) // step + 1 for s, k, step in zip(size, kernel, stride, strict=True)]
    x = torch.randint(-3, 4, (3, 5, *size)).float()
    read = torch.zeros(size, dtype=torch.bool)
    for axis, (k, step, count) in enumerate(zip(kernel, stride, out, strict=True)):
        pixels = torch.tensor([t * step + tap for t in range(count) for tap in range(k)])
        line = torch.zeros(size[axis], dtype=torch.bool).index_fill_(0, pixels, True)
        line = line.view([-1 if i == axis else 1 for i in range(len(size))]).expand(size)
        read = line.clone() if axis == 0 else read & line
    x = torch.where(read, x, torch.nan)
    gy = torch.randint(-3, 4, (3, 7, *out)).float()
    geometry = (list(kernel), list(stride), [0] * len(size), [1] * len(size), 1)
    clean = torch.nan_to_num(x)
    want = reference.conv_norm_sq(clean.double(), gy.double(), *geometry)
    want_grads = reference.conv_grads(clean.double(), gy.double(), *geometry)[1]
    if last:
        x, gy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, gy))
    torch.testing.assert_close(emulated.conv_norm_sq(x, gy, *geometry, form).double(), want, rtol=2e-6, atol=0)
    norm_sq, grads = emulated.conv_grads(x, gy, *geometry)
    torch.testing.assert_close(norm_sq.double(), want, rtol=2e-6, atol=0)
    torch.testing.assert_close(grads.double(), want_grads, rtol=1e-5, atol=1e-5)


def test_operands_that_need_gradients_and_autocast(kernels):
    """Products with a place to write to refuse operands that need gradients, and autocast would round them."""
    a, b = torch.randn(2, 20, 8, requires_grad=True), torch.randn(2, 20, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = kernels.linear_norm_sq(a, b, "gram")
    want = reference.linear_norm_sq(a.detach().double(), b.detach().double())
    torch.testing.assert_close(got.detach().double(), want, rtol=2e-6, atol=0)
