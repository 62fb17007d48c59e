"""Owners of rows, told from marks in C++: as tensor operators tell them, whatever the numbers are."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engm._C import add_digit, are_owned, first_alike, owners_of
from engm.graph.owners import BASE, BLIND, NOBODY, SEVERAL, numbers_of

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}
SPOILED = st.sampled_from([1.0, 1.0, 1.0, 1.3, 0.0, 2.0, -1.0, math.nan, math.inf, 1 + 1e-12, 1e-30])


def told_by_operators(plain, scaled, numbers, n, tolerance):
    """The numbers of the owners, and the owners, by one operator after the other."""
    largest = plain.abs().amax(1)
    of, several = torch.zeros(len(plain), dtype=torch.long), torch.zeros(len(plain), dtype=torch.bool)
    for place, marks in zip(numbers.places, scaled, strict=True):
        power = (marks.abs().amax(1) / largest).log2().round().nan_to_num(0, 0, 0).clamp(0, BASE + 1)
        factor = torch.exp2(power)
        differs = (marks - factor.unsqueeze(1) * plain).abs().amax(1)
        several |= ~(differs <= tolerance * largest * factor)
        several |= (largest != 0) & ((power < 1) | (power > BASE))
        of += (power.long() - 1).clamp(0, BASE - 1) * place
    examples = numbers.all_examples[of]
    owners = torch.where(several | (examples >= n), SEVERAL, examples)
    owners = torch.where((largest == 0) & ~several, NOBODY, owners)
    return of, torch.where(largest.isfinite(), owners, BLIND)


@st.composite
def rows(draw):
    """Marks of rows of known owners, some of them spoiled."""
    n = draw(st.integers(1, 300))
    width, dtype = draw(st.integers(1, 2)), draw(st.sampled_from([torch.float32, torch.float64]))
    owners = torch.tensor(draw(st.lists(st.integers(-1, n - 1), max_size=8)), dtype=torch.long)
    numbers = numbers_of(n, False)
    plain = torch.randn(len(owners), width, dtype=dtype) * 10.0 ** draw(st.integers(-5, 5))
    plain[owners == NOBODY] = 0
    own = numbers.of[owners.clamp_min(0)]
    scaled = [torch.exp2((own // place % BASE + 1).to(dtype)).unsqueeze(1) * plain for place in numbers.places]
    clean = True
    for row in range(len(owners)):
        for marks in (plain, *scaled):
            times = draw(SPOILED)
            clean &= times == 1
            marks[row] *= times
    return n, numbers, plain, scaled, owners, clean


@given(rows())
def test_as_by_operators(given):
    n, numbers, plain, scaled, owners, clean = given
    of, several = torch.zeros(len(plain), dtype=torch.long), torch.zeros(len(plain), dtype=torch.bool)
    tolerance = TOLERANCE[plain.dtype]
    for place, marks in zip(numbers.places, scaled, strict=True):
        add_digit(of, several, plain, marks, place, BASE, tolerance)
    found = owners_of(of, several, plain, numbers.all_examples, n, SEVERAL, NOBODY, BLIND)
    wanted_numbers, wanted = told_by_operators(plain, scaled, numbers, n, tolerance)
    assert torch.equal(of, wanted_numbers)
    assert torch.equal(found, wanted)
    if clean:
        assert torch.equal(found, owners)
        assert are_owned(of, found, plain, scaled, numbers.places, BASE)


@given(rows(), st.data())
def test_rows_of_others_are_not_owned(given, data):
    """A row of one tensor has another owner than that of the other tensor, or somebody where there was nobody."""
    n, numbers, plain, scaled, owners, clean = given
    if not clean or not len(owners) or n == 1:
        return
    row = data.draw(st.integers(0, len(owners) - 1))
    if owners[row] == NOBODY:
        for marks in (plain, *scaled):
            marks[row] = 1.0
    others = owners.clone()
    others[row] = (owners[row] + 1) % n if owners[row] >= 0 else NOBODY
    assert not are_owned(numbers.of[others.clamp_min(0)], others, plain, scaled, numbers.places, BASE)


def test_what_does_not_fit_is_refused_and_nothing_is_changed():
    of, several = torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool)
    plain = torch.ones(3, 2)
    for marks in (torch.ones(2, 2), torch.ones(3, 2).double(), torch.ones(2, 3).t(), torch.ones(3)):
        with pytest.raises(RuntimeError, match="expected marks"):
            add_digit(of, several, plain, 2 * marks, 1, BASE, 1e-5)
    with pytest.raises(RuntimeError, match="number for every row"):
        add_digit(of.int(), several, plain, 2 * plain, 1, BASE, 1e-5)
    with pytest.raises(RuntimeError, match="a truth value for every row"):
        add_digit(of, several[:2], plain, 2 * plain, 1, BASE, 1e-5)
    with pytest.raises(RuntimeError, match="a place for every digit"):
        are_owned(of, of, plain, [plain, plain], [1], BASE)
    with pytest.raises(RuntimeError, match="no such number"):
        owners_of(of + 7, several, plain, torch.arange(2), 2, SEVERAL, NOBODY, BLIND)
    assert not of.any()
    assert not several.any()


@given(st.lists(st.lists(st.integers(0, 1), max_size=3), max_size=8))
def test_parts_that_are_alike(parts):
    numbers = torch.tensor([number for part in parts for number in part], dtype=torch.long)
    assert first_alike(numbers, [len(part) for part in parts]) == [parts.index(part) for part in parts]


def test_parts_have_to_fit():
    with pytest.raises(RuntimeError, match="longer than the numbers"):
        first_alike(torch.zeros(3, dtype=torch.long), [2, 2])
