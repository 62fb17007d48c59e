"""The Gram form's kernels against float64, for the operands as the tensor cores see them."""

import ctypes

import pytest
import torch
from emulator.build import CSRC, EMULATOR, build_library, kernel_unit, runtime_units
from emulator.gram_library import PRECISIONS, SM_86, SM_90, SMALL, Conv, Library, address, array
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

precisions = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS.keys())


@pytest.fixture(scope="module")
def library():
    kernels = sorted((CSRC / "cuda").glob("gram_*.cu"))
    units = [kernel_unit(path) for path in (EMULATOR / "gram_cases.cpp", *kernels)] + runtime_units()
    return Library(ctypes.CDLL(str(build_library("gram_cases", units, with_torch=False))))


@pytest.fixture(autouse=True)
def _a_card_with_much_shared_memory(monkeypatch):
    monkeypatch.setenv("ENGM_EMULATOR_SHARED_KB", "227")


def operand(shape, dtype: torch.dtype, last: bool = False, skip: int = 0) -> Tensor:
    """Random numbers, `last` with the channels last in memory, `skip` elements behind an aligned address."""
    if last:
        shape = (shape[0], *shape[2:], shape[1])
    count = torch.Size(shape).numel()
    t = torch.randn(count + skip).to(dtype)[skip:].view(shape)
    return t.movedim(-1, 1) if last else t


LAYOUTS = st.fixed_dictionaries({"last": st.booleans(), "skip": st.sampled_from([0, 0, 1])})
LIMITS = st.sampled_from([SMALL, SM_86, SM_90])
CHANNELS = st.one_of(st.integers(1, 20), st.sampled_from([24, 32, 72, 135]))


@precisions
@given(data=st.data())
def test_convolutions(library, precision, data):
    draw = data.draw
    dimensions = draw(st.integers(1, 3))
    sizes = [st.integers(1, most) for most in {1: (40,), 2: (13, 13), 3: (5, 6, 7)}[dimensions]]

    def each(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * dimensions))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    conv = Conv(each(1, 5 if dimensions < 3 else 3), each(1, 3), each(0, 2), each(1, 2), groups)
    size = draw(st.tuples(*sizes))
    output = conv.output(size)
    assume(min(output) >= 1)
    n = draw(st.integers(1, 2))
    x = operand((n, groups * draw(CHANNELS), *size), precision.dtype, **draw(LAYOUTS))
    gy = operand((n, groups * draw(CHANNELS), *output), precision.dtype, **draw(LAYOUTS))
    library.check(x, gy, conv, precision, draw(LIMITS))


@precisions
@given(data=st.data())
def test_linear_layers(library, precision, data):
    draw = data.draw
    n, positions = draw(st.integers(1, 3)), draw(st.one_of(st.integers(1, 20), st.integers(60, 140)))
    x = operand((n, draw(CHANNELS), positions), precision.dtype, **draw(LAYOUTS))
    gy = operand((n, draw(CHANNELS), positions), precision.dtype, **draw(LAYOUTS))
    library.check(x, gy, Conv(), precision, draw(LIMITS))


CASES = {  # conv, size, channels, rows, limit, something that the plan has to be
    "one small band": (Conv((3, 3), padding=(1, 1)), (4, 4), 200, 150, SM_90, {"pairs": 1, "steps": 16}),
    "one band": (Conv((3, 3), padding=(1, 1)), (8, 8), 72, 33, SM_90, {"pairs": 1, "threads": 256}),
    "a wide halo": (Conv((3, 3), padding=(1, 1)), (16, 16), 20, 9, SM_90, {"pairs": 10, "threads": 512}),
    "taps in chunks": (Conv((5, 5), padding=(2, 2), dilation=(2, 3)), (9, 10), 9, 5, SMALL, {"threads": 256}),
    "taps apart": (Conv((1, 1), stride=(2, 2)), (16, 15), 40, 24, SM_90, {"pairs": 1, "apart": 2, "chunks": 1}),
    "patches": (Conv((4, 4), stride=(4, 4)), (16, 16), 3, 24, SMALL, {}),
    "padding alone": (Conv((1, 3), padding=(2, 0)), (1, 5), 6, 5, SMALL, {}),
    "bands of padding": (Conv((1,), padding=(100,)), (3,), 6, 5, SM_90, {}),
    "a line": (Conv((9,), padding=(4,)), (150,), 12, 12, SM_90, {}),
    "a volume": (Conv((3, 3, 3), padding=(1, 1, 1)), (6, 5, 7), 10, 6, SM_90, {}),
    "a depthwise convolution": (Conv((3, 3), padding=(1, 1), groups=5), (6, 6), 5, 10, SM_86, {"pairs": 1}),
    "a linear layer": (Conv(), (64,), 130, 90, SM_90, {"pairs": 1, "threads": 256}),
    "a long linear layer": (Conv(), (197,), 40, 24, SM_90, {"pairs": 10}),
}


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize("case", CASES)
@precisions
def test_plans(library, precision, case, last):
    conv, size, channels, rows, limit, plan = CASES[case]
    x = operand((1, channels, *size), precision.dtype, last)
    gy = operand((1, rows, *conv.output(size)), precision.dtype, last)
    result = library.check(x, gy, conv, precision, limit)
    # Double needs twice the memory, 16 bits half the depth.
    keep = set(plan) - ({"steps"} if precision.dtype.itemsize == 2 else set())
    assert {name: result.plan[name] for name in keep} == {name: plan[name] for name in keep}


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
@precisions
def test_every_schedule_gives_the_same_bits(library, precision, last, monkeypatch):
    results = []
    for seed in range(6):
        monkeypatch.setenv("ENGM_EMULATOR_SEED", str(seed))
        torch.manual_seed(1)
        conv = Conv((3, 3), padding=(1, 1))
        for size, channels, rows in (((5, 5), 150, 90), ((9, 9), 72, 40), ((12, 13), 70, 36)):
            x = operand((1, channels, *size), precision.dtype, last)
            gy = operand((1, rows, *size), precision.dtype, last)
            result = library.check(x, gy, conv, precision)
            results.append((size, result.out.item(), result.magnitude.item()))
    assert len(set(results)) == 3


@precisions
def test_cancellation_is_handed_back(library, precision):
    # Means of 100 and backprops that sum to zero over the positions.
    n, positions = 3, 24
    x = torch.randn(n, 16, positions)
    gy = torch.randn(n, 12, positions)
    x[1] += 100
    gy[1] -= gy[1].mean(1, keepdim=True)
    x, gy = x.to(precision.dtype), gy.to(precision.dtype)
    result = library.check(x, gy, Conv(), precision)
    assert result.reliable[0] == result.reliable[2] == 1
    expected = Conv().norm_sq(precision.seen(x), precision.seen(gy))
    ratio = (result.magnitude / expected)[1] / precision.cancellation
    assert result.reliable[1] == int(ratio < 1)
    if precision.dtype != torch.bfloat16:  # rounding leaves 16-bit backprops a sum that is not small
        assert ratio > 1.01 or precision.dtype == torch.float16


@precisions
def test_nothing_is_left_of_zero(library, precision):
    x = operand((3, 9, 10), precision.dtype)
    gy = operand((3, 7, 10), precision.dtype)
    x[1], gy[2] = 0, 0
    result = library.check(x, gy, Conv(), precision)
    assert result.out[1:].tolist() == [0, 0]
    assert result.reliable == [1, 1, 1]


@precisions
def test_a_negative_sum_is_clamped_and_handed_back(library, precision):
    # G = 0 exactly; its Gram is a sum of rounded numbers around zero.
    x = (torch.ones(8, 16, 1, dtype=torch.float64) / 3).expand(8, 16, 30).to(precision.dtype)
    gy = torch.randn(8, 5, 30).to(precision.dtype)
    gy[..., 15:] = -gy[..., :15]
    result = library.gram(x, gy, Conv(), precision)
    assert bool((result.out >= 0).all())
    assert result.reliable == [0] * 8


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@precisions
def test_what_is_not_finite_is_left_to_the_direct_form(library, precision, value):
    x, gy = operand((3, 9, 5, 5), precision.dtype), operand((3, 7, 5, 5), precision.dtype)
    x[1, 2, 3, 3] = value
    result = library.gram(x, gy, Conv((3, 3), padding=(1, 1)), precision)
    assert result.out[[0, 2]].isfinite().all()
    assert result.reliable == [1, 0, 1]


@precisions
def test_an_expanded_operand(library, precision):
    x = operand((2, 16, 6, 6), precision.dtype, last=True)
    gy = operand((2, 8, 1, 1), precision.dtype, last=True).expand(2, 8, 6, 6)
    library.check(x, gy, Conv((3, 3), padding=(1, 1)), precision)
    library.check(x[:1].expand(2, 16, 6, 6), gy, Conv((3, 3), padding=(1, 1)), precision)


def test_examples_far_apart(library):
    # Offsets of examples beyond 2^31 elements, in memory that is never touched in between.
    step = (1 << 31) + 64
    memory = torch.empty(step + 1000, dtype=torch.float16)
    x, gy = memory.as_strided((2, 6, 9), (step, 9, 1)), memory.as_strided((2, 5, 9), (step, 9, 1), 500)
    x.normal_(), gy.normal_()
    library.check(x, gy, Conv(), PRECISIONS["float16"])


@precisions
def test_no_plan(library, precision):
    x, gy = operand((1, 4, 5), precision.dtype), operand((1, 4, 5), precision.dtype)
    assert library.plan(Conv().numbers(x, gy), precision, 600)[0] == 0
    long = operand((1, 1, 1), precision.dtype).expand(1, 1, 1 << 23)
    assert library.plan(Conv().numbers(long, long), precision)[0] == 0


@precisions
def test_partial_sums_of_an_example(library, precision):
    x, gy = operand((2, 6, 150), precision.dtype), operand((2, 4, 150), precision.dtype)
    count, plan = library.plan(Conv(groups=2).numbers(x, gy), precision)
    assert plan["bands"] == 3
    assert count == 2 * 2 * 6  # two numbers, two groups, pairs of bands


@precisions
@given(data=st.data())
def test_rank_one(library, precision, data):
    n, widths = data.draw(st.integers(1, 4)), st.one_of(st.integers(1, 40), st.integers(500, 1100))
    factors = []
    for _ in range(2):
        width, skip = data.draw(widths), data.draw(st.sampled_from([0, 0, 1]))
        factor = operand((n, width), precision.dtype, data.draw(st.booleans()), skip)
        factors.append(factor[:, :: data.draw(st.sampled_from([1, 1, 2]))])
    a, b = factors
    out = torch.full((n,), torch.nan, dtype=precision.sums)
    sizes = [ctypes.c_int64(v) for v in (n, a.shape[1], b.shape[1])]
    strides = array([*a.stride(), *b.stride()])
    assert library.loaded.run_rank_one(precision.number, *sizes, strides, address(a), address(b), address(out)) is None
    expected = a.double().square().sum(1) * b.double().square().sum(1)
    torch.testing.assert_close(out.double(), expected, rtol=1e-14 if out.dtype == torch.float64 else 1e-6, atol=0)
