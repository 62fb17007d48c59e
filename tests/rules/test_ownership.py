"""The rules of operators, whoever owns the rows of an operator's output: held against a backward pass an example."""

import pytest
import torch
import torch.nn.functional as F
from entering import assert_near, check_entry, own_gradients, random_owners
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import tensor

from engm.rules.any_operator import masked_gradients
from engm.rules.entries import Entry, entry_term
from engm.terms import PerExampleGradient
from engm.terms.layout import Layout
from engm.terms.owners import Owners

pytestmark = pytest.mark.torch_insides

N = 3


def leaf(*shape, seed=1):
    return tensor(*shape, seed=seed).requires_grad_()


# An operator takes [rows, steps, 4], and what enters; "deepest" is how many leading dimensions its rule takes for rows.
OPERATORS = {
    "add": (lambda x, p: x + p, [(4,), (1, 1, 4), (1,), (), "t4", "t1"], 3),
    "sub": (lambda x, p: torch.sub(x, p, alpha=3), [(4,), "t4"], 3),
    "mul": (lambda x, p: x * p, [(4,), (1, 1, 1), (), "r14", "rt4"], 3),
    "div": (lambda x, p: p / (x.square() + 1), [(4,), "r11"], 3),
    "expand": (lambda x, p: p.expand(*x.shape), [(4,), "1t1", (1,), ()], 3),
    "repeat": (lambda x, p: p.repeat(2 * x.shape[0], x.shape[1], 2), [(1, 2, 2), (2,), "11t"], 3),
    "mm": (lambda x, p: x.flatten(0, 1) @ p, [(4, 2)], 1),
    "mm, transposed": (lambda x, p: x.flatten(0, 1) @ p.t(), [(2, 4)], 1),
    "mm, on the left": (lambda x, p: p @ x[:, 0], ["5r"], 1),
    "addmm": (lambda x, p: torch.addmm(x[0, :1, :2], x.flatten(0, 1), p, beta=2, alpha=3), [(4, 2)], 1),
    "addmm, first": (lambda x, p: torch.addmm(p, x.flatten(0, 1), x[0].t(), beta=2), ["t", (1,)], 2),
    "bmm": (lambda x, p: torch.bmm(x, p), ["r42"], 2),
    "bmm, on the left": (lambda x, p: torch.bmm(p, x), ["r5t"], 2),
    "baddbmm": (lambda x, p: torch.baddbmm(x[:, :1, :2], x, p, beta=2, alpha=3), ["r42"], 2),
    "baddbmm, on the left": (lambda x, p: torch.baddbmm(x[:, :1], p, x, alpha=3), ["r5t"], 2),
    "baddbmm, first": (lambda x, p: torch.baddbmm(p, x, x.mT, beta=2), ["t", "r1t"], 3),
    "conv": (lambda x, p: F.conv1d(x.mT, p, padding=1), [(2, 4, 3)], 1),
    "conv, groups": (lambda x, p: F.conv1d(x.mT, p, padding="same", groups=2), [(6, 2, 3)], 1),
    "conv, transposed": (lambda x, p: F.conv_transpose1d(x.mT, p, stride=2, output_padding=1), [(4, 2, 3)], 1),
    "conv, shift": (lambda x, p: F.conv1d(x.mT, torch.ones(2, 4, 1).double(), p), [(2,)], 3),
    "embedding": (lambda x, p: F.embedding(x.argmax(2), p, padding_idx=1), [(4, 3)], 2),
    "layer norm": (lambda x, p: F.layer_norm(x, (4,), p), [(4,)], 2),
    "layer norm, shift": (lambda x, p: F.layer_norm(x, (4,), None, p), [(4,)], 2),
    "layer norm, deep": (lambda x, p: F.layer_norm(x, tuple(p.shape), p), ["t4"], 1),
    "group norm": (lambda x, p: F.group_norm(x.mT, 2, p), [(4,)], 1),
    "group norm, shift": (lambda x, p: F.group_norm(x.mT, 2, torch.ones(4).double(), p), [(4,)], 1),
    "batch norm": (
        lambda x, p: F.batch_norm(x.mT, torch.zeros(4).double(), torch.ones(4).double(), p),
        [(4,)],
        1,
    ),
}


def cases():
    return [
        (name, operator, shape, deepest) for name, (operator, shapes, deepest) in OPERATORS.items() for shape in shapes
    ]


def sized(shape, rows, steps):
    """``"rt4"`` stands for ``(rows, steps, 4)``."""
    return tuple({"r": rows, "t": steps}.get(size) or int(size) for size in shape)


@settings(max_examples=8)
@given(data=st.data(), rows=st.integers(1, 6), steps=st.integers(1, 4), seed=st.integers(0, 9))
@pytest.mark.parametrize(("name", "operator", "shape", "deepest"), cases())
def test_owners_of_any_depth(name, operator, shape, deepest, data, rows, steps, seed):
    entering = leaf(*sized(shape, rows, steps))
    output = operator(tensor(rows, steps, 4, seed=seed), entering)
    dims = data.draw(st.integers(1, output.dim()))
    owners = Owners(random_owners(tuple(output.shape[:dims]), N, seed), N)
    check_entry(output, entering, owners, N, ruled=None if name == "mm, on the left" else dims <= deepest)


def layouts_of(shape, n):
    """Every layout that a tensor may have by its shape."""
    found = []
    for dim, size in enumerate(shape[:2]):
        rows = size // n if size % n == 0 else 0
        found += [Layout(dim, outer, rows // outer) for outer in range(1, rows + 1) if rows % outer == 0]
    return found


@settings(max_examples=5)
@given(data=st.data(), n=st.integers(1, 3), each=st.integers(1, 3), steps=st.integers(1, 4))
@pytest.mark.parametrize(("name", "operator", "shape", "deepest"), cases())
def test_regular_layouts(name, operator, shape, deepest, data, n, each, steps):
    entering = leaf(*sized(shape, n * each, steps))
    output = operator(tensor(n * each, steps, 4), entering)
    layout = data.draw(st.sampled_from(layouts_of(tuple(output.shape), n) or [None]))
    if layout is not None:
        check_entry(output, entering, layout, n, ruled=None if name == "mm, on the left" else layout.dim < deepest)


@pytest.mark.parametrize(("name", "operator", "shape", "deepest"), cases())
@pytest.mark.parametrize(("rows", "steps"), [(0, 2), (2, 0)])
def test_outputs_without_elements(name, operator, shape, deepest, rows, steps):
    """There is a gradient, and it is zero."""
    if name.startswith("group norm") and torch.__version__ < (2, 13):
        pytest.skip("torch's own backward pass of a group norm without elements fails")
    entering = leaf(*(max(size, 0) for size in (rows if s == "r" else steps if s == "t" else int(s) for s in shape)))
    try:
        output = operator(torch.zeros(rows, steps, 4).double(), entering)
    except (RuntimeError, IndexError, ValueError) as refused:
        pytest.skip(f"torch refuses: {refused}")
    if output.grad_fn is None or ("NativeBatchNorm" not in output.grad_fn.name() and name == "batch norm"):
        pytest.skip("torch computes something else")
    for dims in range(1, output.dim() + 1):
        owners = Owners(random_owners(tuple(output.shape[:dims]), N), N)
        check_entry(output, entering, owners, N, ruled=None)


def test_every_output_has_owners_of_its_own():
    entering = leaf(4, 6)
    outputs = entering.split(2, 1)
    layout, owners = Layout(0, 1, 2), Owners(torch.tensor([[1, 0]] * 4), 2)
    gradients = [tensor(4, 2, seed=k) for k in range(3)]
    truth = sum(own_gradients(outputs[k], entering, gradients[k], where, 2) for k, where in enumerate((layout, owners)))
    entry = Entry(outputs[0].grad_fn, 0, (4, 6), layout, 2, others=(owners, None))
    assert_near(masked_gradients(entry, gradients).gradient, truth)


COMPLEX = {
    "add": lambda x, p: torch.add(x, p, alpha=2 - 1j),
    "sub": lambda x, p: torch.sub(x, p, alpha=1j),
    "mul": lambda x, p: x * p,
    "div": lambda x, p: p / (x + 3),
    "expand": lambda x, p: p.expand(*x.shape),
    "mm": lambda x, p: x @ p.expand(4, 4),
}


@settings(max_examples=8)
@given(data=st.data(), rows=st.integers(1, 6))
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers(name, dtype, data, rows):
    """What enters a complex computation may be real: then the imaginary part of the contributions is dropped."""
    entering = (leaf(4) if dtype == torch.float64 else torch.complex(tensor(4), tensor(4, seed=2))).detach()
    entering.requires_grad_()
    x = torch.complex(tensor(rows, 4), tensor(rows, 4, seed=3))
    if dtype == torch.float64 and name in ("expand", "mm"):
        return
    output = COMPLEX[name](x, entering)
    if name == "mm":
        shared = torch.complex(tensor(4, 4), tensor(4, 4, seed=2)).requires_grad_()
        entering, output = shared, x @ shared
    dims = data.draw(st.integers(1, 2))
    check_entry(
        output, entering, Owners(random_owners((rows, 4)[:dims], N), N), N, ruled=None if name == "mm" else True
    )


def test_a_function_of_the_users_is_no_operator_of_torch_because_of_its_name():
    class Mul(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, p):
            ctx.save_for_backward(x)
            return x * p

        @staticmethod
        def backward(ctx, gradient):
            return None, (ctx.saved_tensors[0] * gradient * 7).sum(0)

    entering = leaf(4)
    output = Mul.apply(tensor(3, 4), entering)
    check_entry(output, entering, Layout(), 3, ruled=False)


def test_experts_need_no_gradient_an_example():
    """A matrix that rows of any owners meet keeps factors."""
    stacked = leaf(2, 5, 4)
    weight = stacked[1]
    output = tensor(6, 4) @ weight.t()
    entry = Entry(output.grad_fn, 1, (5, 4), Owners(random_owners((6,), N), N), N, turns=1)
    term = entry_term(entry, [tensor(6, 5)])
    assert term is not None
    assert not isinstance(term, PerExampleGradient)


@settings(max_examples=20)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    behind=st.integers(0, 2),
    regular=st.booleans(),
    transposed=st.booleans(),
)
def test_rows_in_groups_that_meet_one_matrix_each(counts, behind, regular, transposed):
    """torch knows no such product in float64; rows behind the last group meet no matrix, and have any gradient."""
    ends, shape = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32), (len(counts), 8, 4)
    rows = N * (sum(counts) + behind) if regular else sum(counts) + behind
    if rows == 0:
        return
    entering = leaf(*shape).detach().float().requires_grad_()
    output = F.grouped_mm(
        tensor(rows, 4 if transposed else 8).float(), entering.mT if transposed else entering, offs=ends
    )
    node, gy = output.grad_fn, tensor(*output.shape, seed=3).float()
    owners = Layout() if regular else Owners(random_owners((rows,), N), N)
    if regular and rows != N:
        owners = Layout(0, rows // N, 1)
    entry = Entry(node, 1, (len(counts), 4, 8) if transposed else shape, owners, N)
    term = entry_term(entry, [gy])
    assert term is not None
    gy[int(ends[-1]) :] = 0  # torch's own backward pass leaves them out as well
    want = masked_gradients(entry, [gy])
    torch.testing.assert_close(term.dense(slice(0, N)), want.dense(slice(0, N)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(term.squared_norm(), want.squared_norm(), rtol=1e-5, atol=1e-5)
    weights = torch.rand(N)
    torch.testing.assert_close(term.weighted_sum(weights), want.weighted_sum(weights), rtol=1e-5, atol=1e-5)
