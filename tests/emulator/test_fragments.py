"""The emulated instructions against the PTX ISA's layouts, and the policies of mma.cuh against plain products."""

import ctypes

import pytest
import torch
from emulator.build import EMULATOR, build_library, kernel_unit, runtime_units

LANES = range(32)

# PTX ISA, "Warp-level matrix instructions": the row and column of element i that a lane holds. groupID = lane >> 2,
# threadID_in_group = lane % 4. For each shape: rows and columns of A, B and C, elements of A, B and C a lane.
LAYOUTS = {
    "m16n8k8.tf32": {
        "shape": (16, 8, 8),
        "a": (4, lambda g, t, i: (g if i in (0, 2) else g + 8, t if i in (0, 1) else t + 4)),
        "b": (2, lambda g, t, i: (t if i == 0 else t + 4, g)),
        "c": (4, lambda g, t, i: (g if i < 2 else g + 8, t * 2 + (i & 1))),
    },
    "m16n8k16": {
        "shape": (16, 8, 16),
        "a": (
            8,
            lambda g, t, i: (
                g if 0 <= i < 2 or 4 <= i < 6 else g + 8,
                t * 2 + (i & 1) if i < 4 else t * 2 + (i & 1) + 8,
            ),
        ),
        "b": (4, lambda g, t, i: (t * 2 + (i & 1) if i < 2 else t * 2 + (i & 1) + 8, g)),
        "c": (4, lambda g, t, i: (g if i < 2 else g + 8, t * 2 + (i & 1))),
    },
    "m8n8k4.f64": {
        "shape": (8, 8, 4),
        "a": (1, lambda g, t, i: (g, t)),
        "b": (1, lambda g, t, i: (t, g)),
        "c": (2, lambda g, t, i: (g, t * 2 + (i & 1))),
    },
}
SIXTEEN_BIT = {1: torch.bfloat16, 2: torch.float16}
PRECISIONS = {"tf32": (0, 16, 8, 8), "tf32x3": (1, 16, 8, 8), "bf16": (2, 16, 8, 16), "fp16": (3, 16, 8, 16)}
PRECISIONS["f64"] = (4, 8, 8, 4)


@pytest.fixture(scope="module")
def library():
    path = build_library("fragments", [kernel_unit(EMULATOR / "fragments.cpp"), *runtime_units()], with_torch=False)
    loaded = ctypes.CDLL(str(path))
    for name in ("mma", "mma_double", "load_matrix", "product"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def address(t):
    assert t.is_contiguous()
    return ctypes.c_void_p(t.data_ptr())


def places(layout, operand):
    """[32, elements] indices of rows and of columns."""
    count, place = LAYOUTS[layout][operand]
    both = torch.tensor([[place(lane >> 2, lane % 4, i) for i in range(count)] for lane in LANES])
    return both[..., 0], both[..., 1]


def integers(*shape):
    return torch.randint(-8, 9, shape).double()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_is_held_once(layout):
    m, n, k = LAYOUTS[layout]["shape"]
    for operand, rows, columns in (("a", m, k), ("b", k, n), ("c", m, n)):
        row, column = places(layout, operand)
        assert sorted((row * columns + column).flatten().tolist()) == list(range(rows * columns))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_mma(library, which):
    layout = "m16n8k16" if which else "m16n8k8.tf32"
    m, n, k = LAYOUTS[layout]["shape"]
    a, b, c = integers(m, k), integers(k, n), integers(m, n)
    registers = []
    for operand, values in (("a", a), ("b", b)):
        held = values[places(layout, operand)]
        held = held.to(SIXTEEN_BIT[which]) if which else held.float()
        registers.append(held.contiguous().view(torch.int32).contiguous())
    sums = c.float()[places(layout, "c")].contiguous()
    assert library.mma(address(registers[0]), address(registers[1]), address(sums), which) is None
    torch.testing.assert_close(sums.double(), (a @ b + c)[places(layout, "c")], rtol=0, atol=0)


def test_mma_double(library):
    m, n, k = LAYOUTS["m8n8k4.f64"]["shape"]
    a, b, c = torch.randn(m, k).double(), torch.randn(k, n).double(), torch.randn(m, n).double()
    sums = c[places("m8n8k4.f64", "c")].contiguous()
    held = [values[places("m8n8k4.f64", operand)].contiguous() for operand, values in (("a", a), ("b", b))]
    assert library.mma_double(address(held[0]), address(held[1]), address(sums)) is None
    torch.testing.assert_close(sums, (a @ b + c)[places("m8n8k4.f64", "c")], rtol=1e-14, atol=1e-14)


def test_mma_reads_nineteen_bits_of_tf32(library):
    a = torch.full((32, 4), 1 + 2.0**-10 + 2.0**-11).view(torch.int32)
    b, sums = torch.ones(32, 2).view(torch.int32), torch.zeros(32, 4)
    assert library.mma(address(a), address(b), address(sums), 0) is None
    torch.testing.assert_close(sums, torch.full((32, 4), 8 * (1 + 2.0**-10)), rtol=0, atol=0)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrix(library, count, transposed):
    # PTX ISA, ldmatrix: thread 8j + i gives row i of matrix j; row r goes to threads 4r to 4r + 3, two elements each,
    # in order; with .trans the matrix is read in column-major order, so that "row" is column.
    elements = torch.randperm(40 * 8).to(torch.int16)
    lines = torch.randperm(40)[:32].int()
    registers = torch.zeros(32, count, dtype=torch.int32)
    rows = (lines * 8).contiguous()
    assert library.load_matrix(address(elements), address(rows), address(registers), 320, count, transposed) is None
    got = registers.view(torch.int16).view(32, count, 2)
    for j in range(count):
        matrix = elements.view(40, 8)[lines[8 * j : 8 * j + 8].long()]
        matrix = matrix.t() if transposed else matrix
        assert torch.equal(got[:, j].reshape(8, 8), matrix)


@pytest.mark.parametrize("lane", [0, 7, 15])
def test_load_matrix_checks_addresses(library, lane):
    elements, registers = torch.zeros(320, dtype=torch.int16), torch.zeros(32, 2, dtype=torch.int32)
    rows = torch.arange(32, dtype=torch.int32) * 8
    rows[16:] = 3  # not read by x2
    arguments = (address(elements), address(rows), address(registers), 320, 2, False)
    assert library.load_matrix(*arguments) is None
    rows[lane] = 4
    assert b"not a multiple of 16" in library.load_matrix(*arguments)
    rows[lane] = 320
    assert b"bytes of shared memory" in library.load_matrix(*arguments)


def multiply(library, precision, rows_of_k, a, b):
    c = torch.full((a.shape[1], b.shape[1]), torch.nan, dtype=torch.float64)
    row_of = torch.randperm(a.shape[0]).int()
    arguments = (address(a), address(b), address(row_of), address(c))
    assert library.product(PRECISIONS[precision][0], rows_of_k, *arguments) is None
    return c


@pytest.mark.parametrize("rows_of_k", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_policies_multiply(library, precision, rows_of_k):
    _, m, n, k = PRECISIONS[precision]
    a, b = integers(2 * k, 2 * m), integers(2 * k, 2 * n)
    torch.testing.assert_close(multiply(library, precision, rows_of_k, a, b), a.t() @ b, rtol=0, atol=0)


@pytest.mark.parametrize("rows_of_k", [True, False])
@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 2.0**-10), ("tf32x3", 2.0**-20), ("f64", 2.0**-50)])
def test_policies_are_as_precise_as_they_say(library, precision, tolerance, rows_of_k):
    _, m, n, k = PRECISIONS[precision]
    a, b = torch.randn(2 * k, 2 * m).double(), torch.randn(2 * k, 2 * n).double()
    if precision != "f64":
        a, b = a.float().double(), b.float().double()
    error = (multiply(library, precision, rows_of_k, a, b) - a.t() @ b).abs()
    assert (error / (a.abs().t() @ b.abs())).max() < tolerance


def special_floats():
    """Every exponent with fractions around the ties of the 16-bit formats and of TF32, random bits, both signs."""
    exponents = torch.arange(256, dtype=torch.int64).repeat_interleave(64) << 23
    near = torch.tensor([0, 1, 0x7FF, 0x800, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001])
    near = torch.cat([near, 0x7FFFFF - near, 0x400000 + near, torch.randint(0, 1 << 23, (64 - 39,))])
    bits = torch.cat([exponents + near.repeat(256), torch.randint(0, 1 << 31, (100000,))])
    bits = torch.cat([bits, bits - (1 << 31)]).to(torch.int32)
    return bits.view(torch.float32).contiguous()


@pytest.mark.parametrize("name", ["half", "bfloat16"])
def test_rounding_to_sixteen_bits(library, name):
    values = special_floats()
    got = torch.empty(values.shape, dtype=getattr(torch, name))
    getattr(library, f"round_to_{name}")(address(values), address(got), ctypes.c_int64(values.numel()))
    expected = values.to(getattr(torch, name))
    assert torch.equal(got.isnan(), expected.isnan())
    same = got.view(torch.int16) == expected.view(torch.int16)
    assert bool((same | expected.isnan()).all())


@pytest.mark.parametrize("name", ["half", "bfloat16"])
def test_widening_from_sixteen_bits(library, name):
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(getattr(torch, name))
    got = torch.empty(values.shape)
    getattr(library, f"widen_{name}")(address(values), address(got), ctypes.c_int64(values.numel()))
    torch.testing.assert_close(got, values.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit(), values.float().signbit())


def test_rounding_to_tf32(library):
    values = special_floats()
    got = torch.empty_like(values)
    library.round_to_tf32(address(values), address(got), ctypes.c_int64(values.numel()))
    assert torch.equal(got.isnan(), values.isnan())
    infinite = values.isinf()
    assert torch.equal(got[infinite], values[infinite])
    finite = values.isfinite()
    assert bool((got[finite].view(torch.int32) & 0x1FFF == 0).all())
    # Ten bits after the point of the significand, in units of the last of them; ties away from zero.
    wide = values[finite].double()
    exponent = torch.frexp(wide).exponent.clamp(min=-125)
    unit = torch.ldexp(torch.ones_like(wide), exponent - 11)
    expected = wide.sign() * torch.floor(wide.abs() / unit + 0.5) * unit
    expected = torch.where(expected.abs() >= 2.0**128, expected.sign() * torch.inf, expected)
    torch.testing.assert_close(got[finite].double(), expected, rtol=0, atol=0)
