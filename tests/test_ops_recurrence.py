"""The steps of recurrent layers against their twin and autograd: the CPU's loops and ATen's operators."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import forced

from engm import _C, ops, reference

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
EXAMPLES = settings(max_examples=100, deadline=None)
FORMS = {
    "loops": (ops.recurrence, ops.recurrence_back),
    "ATen": (_C.recurrence_of_aten, _C.recurrence_back_of_aten),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def drawn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


class Problem:
    """The operands of one layer, and gradients of what it returns."""

    def __init__(self, kind, n, length, p, size, *, projects=None, bias=True, masked=False, reverse=False, dtype):
        gates, narrow = GATES[kind] * size, projects or size
        draw = lambda *shape: drawn(*shape, dtype=dtype)  # noqa: E731
        self.kind, self.hh = kind, draw(gates, narrow)
        self.hr = draw(narrow, size) if projects else None
        self.biases = [draw(gates) if bias else None for _ in range(2)]
        self.inputs, self.ih = draw(length, n, p).transpose(0, 1), draw(gates, p)
        self.state = [draw(n, 3, narrow)[:, 1]] + ([draw(n, 3, size)[:, 1]] if kind == "LSTM" else [])
        self.how = (torch.rand(n, length) < 0.6 if masked else None, reverse)
        self.outputs = draw(length, n, narrow).transpose(0, 1)
        self.end = [draw(*state.shape) for state in self.state]

    def ran(self, run):
        return run(self.kind, self.inputs, self.ih, self.hh, *self.biases, self.hr, self.state, *self.how)

    def ran_back(self, back, kept, *, outputs=True, end=True):
        hidden, cell = (*self.end, None)[:2] if end else (None, None)
        given = self.outputs if outputs else None
        return back(self.kind, kept, self.hh, self.hr, self.state, given, hidden, cell, *self.how)

    def expected(self, *, outputs=True, end=True):
        """Outputs, and gradients of W_hh h + b_hh, of W_ih x + b_ih and of projected states, in float64."""
        wide = lambda t: None if t is None else t.double()  # noqa: E731
        n, length = self.inputs.shape[:2]
        widths = [self.hh.shape[0]] * 2 + [self.hh.shape[1]]
        more = [torch.zeros(n, length, width, dtype=torch.float64, requires_grad=True) for width in widths]
        found, last = reference.recurrence(
            self.kind, wide(self.inputs), wide(self.ih), wide(self.hh), *map(wide, self.biases), wide(self.hr),
            [wide(state) for state in self.state], *self.how, more,
        )  # fmt: skip
        total = (found * self.outputs).sum() if outputs else found.sum() * 0
        for state, gradient in zip(last, self.end, strict=True) if end else ():
            total = total + (state * gradient).sum()
        return found.detach(), torch.autograd.grad(total, more, materialize_grads=True)

    def check(self, form, **given):
        run, back = FORMS[form]
        dtype = self.hh.dtype
        outputs, (of_hidden, of_inputs, of_projected) = self.expected(**given)
        kept = self.ran(run)
        close(kept[0], outputs, dtype)
        found = self.ran_back(back, kept, **given)
        close(found[0], of_hidden, dtype)
        close(found[1] if self.kind == "GRU" else found[0], of_inputs, dtype)
        if self.hr is not None:
            close(found[-1], of_projected, dtype)


def close(got, want, dtype):
    assert got.dtype == dtype
    scale = float(want.abs().max()) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(scale, 1e-30))


@EXAMPLES
@given(
    isa=st.sampled_from(_C.build_info()["cpu_isas"]),
    form=st.sampled_from(sorted(FORMS)),
    kind=st.sampled_from(sorted(GATES)),
    n=st.sampled_from([1, 3, 4, 9]),
    length=st.sampled_from([1, 2, 5]),
    size=st.sampled_from([1, 3, 8, 17, 33]),
    dtype=st.sampled_from(list(TOLERANCE)),
    bias=st.booleans(),
    masked=st.booleans(),
    reverse=st.booleans(),
    projects=st.booleans(),
    outputs=st.booleans(),
    end=st.booleans(),
)
def test_recurrence_is_its_twin(isa, form, kind, n, length, size, projects, outputs, end, **options):
    options["projects"] = max(1, size // 2) if projects and kind == "LSTM" else None
    problem = Problem(kind, n, length, 3, size, **options)
    with forced(isa):
        problem.check(form, outputs=outputs, end=end)


@pytest.mark.parametrize("kind", sorted(GATES))
@pytest.mark.parametrize(("n", "size"), [(130, 96), (2, 800)])
def test_products_that_are_left_to_aten(kind, n, size):
    """More than 2^20 multiplications a step."""
    assert n * GATES[kind] * size * size > 2**20
    problem = Problem(kind, n, 3, 5, size, masked=True, dtype=torch.float64)
    problem.hh /= size**0.5
    problem.check("loops")


@pytest.mark.parametrize("kind", sorted(GATES))
def test_small_numbers_keep_their_digits(kind):
    """Where all pre-activations are small, tanh is as exact as its argument."""
    problem = Problem(kind, 3, 4, 5, 19, bias=False, dtype=torch.float32)
    problem.inputs, problem.state = problem.inputs * 1e-6, [state * 1e-6 for state in problem.state]
    problem.outputs = problem.outputs * 1e-6
    problem.check("loops", end=False)


@pytest.mark.parametrize("isa", _C.build_info()["cpu_isas"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gates_over_all_numbers(isa, dtype):
    """A layer without products is its activations alone, here of numbers up to the largest that there are."""
    steps = [*torch.logspace(-30, 30, 400).tolist(), *torch.linspace(0.3, 100, 400).tolist(), torch.finfo(dtype).max]
    x = torch.tensor([[step, -step] for step in [0.0, *steps]], dtype=dtype).view(1, -1, 1)
    eye, none, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    with forced(isa):
        found = ops.recurrence("RNN_TANH", x, eye, none, None, None, None, [zero])[0]
        gates = ops.recurrence("LSTM", x, eye.expand(4, 1), none.expand(4, 1), None, None, None, [zero, zero])[1]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), torch.tanh(x.double()), rtol=3 * eps, atol=0)
    torch.testing.assert_close(gates[..., :1].double(), torch.sigmoid(x.double()), rtol=4 * eps, atol=1e-37)
    torch.testing.assert_close(gates[..., 2:3], found, rtol=0, atol=0)


@pytest.mark.parametrize("kind", sorted(GATES))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(kind, bad):
    problem = Problem(kind, 3, 4, 5, 6, dtype=torch.float32)
    problem.outputs = problem.outputs.clone()
    problem.outputs[1, 2, 3] = bad
    kept = problem.ran(ops.recurrence)
    found = problem.ran_back(ops.recurrence_back, kept)[0]
    finite = found.isfinite().flatten(1).all(1).tolist()
    assert finite == [True, kind == "RNN_RELU" and bool(kept[0][1, 2, 3] == 0), True]
    problem.inputs = problem.inputs.clone()
    problem.inputs[0, 1] = float("nan")
    assert problem.ran(ops.recurrence)[0].isnan().flatten(1).all(1).tolist() == [False] * 3
    assert problem.ran(ops.recurrence)[0][0, 1:].isnan().all()


@pytest.mark.parametrize(("n", "length", "size"), [(0, 2, 3), (2, 0, 3)])
@pytest.mark.parametrize("kind", sorted(GATES))
def test_nothing_to_do(kind, n, length, size):
    problem = Problem(kind, n, length, 4, size, dtype=torch.float64)
    kept = problem.ran(ops.recurrence)
    assert problem.ran_back(ops.recurrence_back, kept)[0].shape == (n, length, GATES[kind] * size)


@pytest.mark.parametrize("kind", sorted(GATES))
@pytest.mark.parametrize("projects", [None, 3])
def test_opcheck(kind, projects):
    if projects and kind != "LSTM":
        return
    problem = Problem(kind, 2, 3, 5, 4, projects=projects, masked=True, reverse=True, dtype=torch.float32)
    engm = torch.ops.engm
    problem.ran(lambda *arguments: torch.library.opcheck(engm.recurrence.default, arguments))
    kept = problem.ran(ops.recurrence)
    problem.ran_back(lambda *arguments: torch.library.opcheck(engm.recurrence_back.default, arguments), kept)


X, IH, HH, H = torch.zeros(2, 3, 5), torch.zeros(16, 5), torch.zeros(16, 4), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.recurrence("TREE", X, IH, HH, None, None, None, [H, H]), 'expected "LSTM"'),
        (lambda: ops.recurrence("LSTM", X[0], IH, HH, None, None, None, [H, H]), "expected inputs"),
        (lambda: ops.recurrence("LSTM", X, IH[:15], HH[:15], None, None, None, [H, H]), "expected 4 gates"),
        (lambda: ops.recurrence("GRU", X, IH[:12], HH[:12], None, None, HH[:4], [H]), "hr .* of an LSTM"),
        (lambda: ops.recurrence("LSTM", X, IH, HH, None, None, None, [H]), "expected the hidden state"),
        (lambda: ops.recurrence("LSTM", X, IH, HH, IH, None, None, [H, H]), "expected biases"),
        (lambda: ops.recurrence("LSTM", X, IH, HH, None, None, None, [H, H], X), "expected bools"),
        (lambda: torch.ops.engm.recurrence("LSTM", X.int(), IH, HH, None, None, None, [H, H]), "float32 or float64"),
    ],
)
def test_errors_say_what_came(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
