"""When two runs of a step count as the same."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from engm.recording.agreement import COARSE, Tolerance, all_the_same, same_bits


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ([1.0, float("nan")], [1.0, float("nan")], True),
        ([1.0, float("nan")], [1.0, 2.0], False),
        ([1.0], [1.0 + 1e-7], False),
        ([1.0], [1.0, 1.0], False),
        ([0], [0.0], False),
    ],
)
def test_same_bits(a, b, same):
    assert same_bits(torch.tensor(a), torch.tensor(b)) == same
    assert all_the_same([torch.tensor(a)], [torch.tensor(b)]) == same


def test_same_bits_of_sparse_tensors():
    a = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert same_bits(a.to_sparse(), a.to_sparse())
    assert not same_bits(a.to_sparse(), (2 * a).to_sparse())
    assert not same_bits(a.to_sparse(), a)


FINE = Tolerance(torch.finfo(torch.float64).eps, jumps=False)


@pytest.mark.parametrize(
    ("got", "want", "gradients", "holds"),
    [
        ([[1.0, 1e-3 + 4e-13]], [[1.0, 1e-3]], 0, True),  # as a part of the tensor's largest entry
        ([[1.0, 1e-3 + 6e-13]], [[1.0, 1e-3]], 0, False),
        ([[1e-3 + 4e-13], [1.0]], [[1e-3], [1.0]], 0, False),  # whatever others there are
        ([[1.0], [4e-15]], [[1.0], [0.0]], 2, True),  # but gradients that cancel are measured by the largest
        ([[1.0], [6e-15]], [[1.0], [0.0]], 2, False),
        ([[float("inf"), 1.0]], [[float("inf"), 1.0]], 0, True),
        ([[float("nan"), 1.0]], [[float("inf"), 1.0]], 0, False),
        ([[float("nan")]], [[0.0]], 0, False),
        ([[]], [[]], 0, True),
        ([[1.0], [1.0]], [[1.0]], 0, False),
    ],
)
def test_tolerance(got, want, gradients, holds):
    a, b = ([torch.tensor(v, dtype=torch.float64) for v in values] for values in (got, want))
    assert FINE.holds(a, b, gradients) == holds


def test_integers_have_to_be_the_same():
    coarse = Tolerance(1.0, jumps=True)
    assert coarse.holds([torch.tensor([7])], [torch.tensor([7])], 0)
    assert not coarse.holds([torch.tensor([1000])], [torch.tensor([1001])], 0)
    assert not coarse.holds([torch.tensor([1.0])], [torch.tensor([1.0]).double()], 0)


@pytest.mark.parametrize(
    ("function", "dtype", "relative"),
    [
        (lambda x: x.exp(), torch.float64, 5e-13),
        (lambda x: x.sign(), torch.float64, 5e-13),
        (lambda x: x.exp(), torch.float32, 2.7e-4),
        (lambda x: x.exp().sign_() + 1, torch.float32, COARSE),
        (lambda x: x.exp().bfloat16().float(), torch.float32, COARSE),
    ],
)
def test_tolerance_of_a_program(function, dtype, relative):
    module = make_fx(lambda x: [function(x)], tracing_mode="real")(torch.ones(3, dtype=dtype))
    assert Tolerance.of(module).relative() == pytest.approx(relative, rel=0.01)


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_numbers_of_a_gpu_may_be_rounded_to_tf32(device, allowed):
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed, False
        with FakeTensorMode():
            module = make_fx(lambda x: [x + 1], tracing_mode="real")(torch.ones(3, device=device))
        tolerance = Tolerance.of(module)
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
    fine = pytest.approx(2.7e-4, rel=0.01)
    assert tolerance.relative() == (COARSE if device == "cuda" and allowed else fine)
