"""What is kept of gradients, by which the owners of rows are told: every layout, every type, every way they come."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import tensor
from torch import nn

from engm._C import GradientPrints, PrintHooks, other_exponents
from engm.graph.owners import _directions, dense, prints_of

DIMENSIONS = st.lists(st.integers(0, 4), min_size=0, max_size=4)


def print_by_definition(gradient, by_element):
    """The shape by which rows are told apart, and the rows, real and imaginary parts side by side."""
    numbers = torch.view_as_real(gradient) if gradient.is_complex() else gradient.unsqueeze(-1)
    apart = gradient.dim() if by_element or gradient.dim() < 2 else gradient.dim() - 1
    shape = tuple(gradient.shape[:apart])
    return shape, numbers.reshape(torch.Size(shape).numel(), -1)


@given(DIMENSIONS, st.booleans(), st.sampled_from(["float64", "float32", "bfloat16", "complex128", "complex64"]))
def test_prints(shape, by_element, dtype):
    dtype = getattr(torch, dtype)
    gradient = torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    prints = GradientPrints(by_element, _directions, dense)
    prints.take(7, gradient.mT if gradient.dim() > 1 else gradient)
    ((number, leading, marks, kind, _),) = prints.taken()
    gradient = gradient.mT if gradient.dim() > 1 else gradient
    if gradient.numel() == 0:
        assert not marks.any()
        return
    wanted, rows = print_by_definition(gradient, by_element)
    precise = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    rows = rows.to(precise)
    if rows.shape[1] > 1:
        rows = rows @ _directions(rows.shape[1], precise, rows.device)
    assert (number, leading, kind, marks.dtype) == (7, wanted, dtype, precise)
    torch.testing.assert_close(marks, rows)
    assert prints.taken() == []


def test_conjugated_sparse_and_nested_gradients():
    rows, width = tensor(3, 4), _directions(4, torch.float64, torch.device("cpu"))
    lazy = torch.complex(rows, rows).conj()
    (found,) = prints_of([lazy])
    torch.testing.assert_close(
        found.marks,
        print_by_definition(lazy.resolve_conj(), False)[1] @ _directions(8, torch.float64, torch.device("cpu")),
    )
    for same in (rows.to_sparse(), torch.nested.nested_tensor([rows[:1], rows[1:]], layout=torch.jagged)):
        (found,) = prints_of([same])
        torch.testing.assert_close(found.marks, rows @ width)


def test_under_autocast_products_stay_precise():
    gradient = torch.randn(5, 7)
    wanted = prints_of([gradient])[0].marks
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prints_of([gradient])[0].marks, wanted)


@pytest.mark.parametrize("compiled", [False, True])
def test_hooks_see_what_comes_and_what_goes_on(compiled):
    x, weight = tensor(3, 4).requires_grad_(), tensor(4, 4).requires_grad_()
    hidden = x @ weight
    y = hidden.tanh()
    node = hidden.grad_fn
    prints = GradientPrints(False, _directions, dense)
    hooks = PrintHooks(prints)
    hooks.watch_outputs(node, [(0, 0)])
    hooks.watch_inputs(node, [(1, 2), (0, 1)])
    seed = tensor(3, 4)
    context = torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")) if compiled else None
    if context is None:
        y.backward(seed, retain_graph=True)
    else:
        with context:
            y.backward(seed, retain_graph=True)
    found = {number: marks for number, _, marks, *_ in prints.taken()}
    given = seed * (1 - y.detach() ** 2)
    width = _directions(4, torch.float64, torch.device("cpu"))
    for number, gradient in enumerate((given, x.grad, weight.grad)):
        torch.testing.assert_close(found[number], gradient @ width)
    hooks.remove()
    y.backward(seed)
    assert prints.taken() == []


def test_hooks_of_others_stay():
    layer, x, met = nn.Linear(2, 2), torch.randn(3, 2, requires_grad=True), []
    y = layer(x)
    y.grad_fn.register_prehook(lambda given: met.append("before"))
    y.grad_fn.register_hook(lambda passed, given: met.append("after"))
    hooks = PrintHooks(GradientPrints(False, _directions, dense))
    hooks.watch_outputs(y.grad_fn, [(0, 0)])
    hooks.watch_inputs(y.grad_fn, [(0, 1)])
    hooks.remove()
    y.sum().backward()
    assert met == ["before", "after"]
    with pytest.raises(TypeError, match="expected a node"):
        hooks.watch_outputs(object(), [(0, 0)])


def exponents_by_definition(rows):
    """The sum of the exponents of the elements of a row that count, and of ones, with a number for every place."""
    mantissa, mask, reach = (52, 0x7FF, 200) if rows.dtype == torch.float64 else (23, 0xFF, 60)
    bits = rows.contiguous().view(torch.int64 if rows.dtype == torch.float64 else torch.int32).long()
    places = torch.arange(1, rows.shape[1] + 1)
    numbers = (((places * 2654435761) >> 20) & 0x3F) | 1
    exponents = (bits >> mantissa) & mask
    lowest = exponents.amax(1, keepdim=True) - reach
    counted = (exponents > lowest) & (lowest > 0)
    return torch.stack([(exponents * numbers * counted).sum(1), (numbers * counted).sum(1)], 1)


@given(st.integers(1, 9), st.integers(2, 40_000), st.sampled_from(["float64", "float32"]), st.integers(0, 2**20))
@settings(max_examples=20)
def test_exponents(count, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, dtype)
    rows = torch.randn(count, width, generator=generator, dtype=dtype)
    rows *= 10.0 ** torch.randint(-12, 12, rows.shape, generator=generator)
    rows[:, ::7] = 0
    rows[0] *= 1e-26 if dtype == torch.float32 else 1e-290  # whose smallest elements are hardly normal numbers
    (found,) = prints_of([rows], exponents=True)
    assert torch.equal(found.exponents, exponents_by_definition(rows))
    assert prints_of([rows])[0].exponents is None
    numbers = torch.randint(64, (count,), generator=generator)
    powers = numbers + 1
    (scaled,) = prints_of([rows * torch.exp2(powers.double()).to(dtype).unsqueeze(1)], exponents=True)
    assert not other_exponents(numbers, found.exponents, scaled.exponents, 1, 64).any()
    row, place = count - 1, 1 + 7 * (width // 14) if width > 7 else 1
    if found.exponents[row, 1] and rows[row, place].abs() > rows[row].abs().amax() * 1e-15:
        other = rows.clone()
        other[row, place] *= 2.0**5  # an element of another example, whose power is larger
        (mixed,) = prints_of([other * torch.exp2(powers.double()).to(dtype).unsqueeze(1)], exponents=True)
        others = other_exponents(numbers, found.exponents, mixed.exponents, 1, 64)
        assert others.nonzero().flatten().tolist() == [row]
        found.exponents[row] = 0  # as of a row of nobody's
        assert not other_exponents(numbers, found.exponents, mixed.exponents, 1, 64).any()


def test_exponents_are_of_rows_of_several_numbers():
    assert prints_of([tensor(3)], exponents=True)[0].exponents is None
    assert prints_of([tensor(3, 1)], exponents=True)[0].exponents is None
    assert prints_of([tensor(0, 4)], exponents=True)[0].exponents is None
    assert tuple(prints_of([torch.complex(tensor(3, 1), tensor(3, 1))], exponents=True)[0].exponents.shape) == (3, 2)
