"""Terms of examples whose rows lie in any order and number, against the gradients of the rows summed by owner."""

import time
from dataclasses import fields, replace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import relative, tensor
from term_kinds import KINDS, OF_ONE_SHAPE, assert_term, convolution, correction, embedding, every_kind, linear

import engm.terms.owners
import engm.terms.scattered
from engm.terms import (
    NOBODY,
    ConvFactors,
    EmbeddingFactors,
    LinearFactors,
    MixedTerm,
    Owners,
    PerExampleGradient,
    Scattered,
    Stacked,
    Term,
    TiedTable,
    combine,
)
from engm.terms.layout import PLAIN, Layout

COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=8)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def owners(counts, nobodies=0, seed=0):
    """Owners in random order: example ``i`` has ``counts[i]`` rows, and some rows have no owner."""
    of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    of = torch.cat([of, torch.full((nobodies,), NOBODY)])
    return Owners(of[torch.randperm(len(of), generator=torch.Generator().manual_seed(seed))], len(counts))


def summed(rows, owners):
    """``[n, *shape]``: the dense gradients of the rows, added to their owners one by one."""
    total = torch.zeros(owners.n, *rows.shape[1:], dtype=torch.float64)
    for row, owner in zip(rows, owners.of.flatten().tolist(), strict=True):
        if owner != NOBODY:
            total[owner] += row
    return total


def changed(term, change):
    """The same term with every tensor changed."""
    if isinstance(term, MixedTerm | Stacked):
        return replace(term, parts=[changed(part, change) for part in term.parts])
    values = {field.name: getattr(term, field.name) for field in fields(term)}
    parts = {name: changed(value, change) for name, value in values.items() if isinstance(value, Term)}
    tensors = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(term, **parts, **tensors)


def in_dtype(term, dtype):
    """The same term with its floating point tensors rounded to ``dtype``."""
    return changed(term, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def cropped(term, n):
    """The term of the first ``n`` examples."""
    return changed(term, lambda tensor: tensor[:n])


@every_kind
@given(counts=COUNTS, nobodies=st.integers(0, 3), seed=st.integers(0, 99))
def test_rows_in_any_order_and_number(kind, counts, nobodies, seed):
    of = owners(counts, nobodies, seed)
    if of.of.numel():
        term, rows = KINDS[kind](of.of.numel(), seed=seed)
        want = summed(rows, of)
        regrouped = term.regrouped(of)
        assert_term(regrouped, want)
        assert_term(regrouped.compact(), want)
        without = torch.tensor(counts) == 0
        assert bool((regrouped.squared_norm()[without] == 0).all())


@given(n=st.integers(1, 40), longest=st.integers(0, 12), seed=st.integers(0, 99))
def test_many_examples(n, longest, seed):
    counts = torch.randint(0, longest + 1, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    of = owners(counts, 2, seed)
    term, rows = linear(len(of.of), 2, seed)
    assert_term(term.regrouped(of), summed(rows, of))


@every_kind
def test_one_row_or_equally_many_rows_an_example(kind):
    for of in (owners([1] * 5), owners([3, 3])):
        term, rows = KINDS[kind](len(of.of))
        assert_term(term.regrouped(of), summed(rows, of))


@every_kind
def test_examples_without_any_rows(kind):
    of = Owners(torch.full((4,), NOBODY), 3)
    term, rows = KINDS[kind](4)
    assert_term(term.regrouped(of), torch.zeros(3, *rows.shape[1:], dtype=torch.float64))


@every_kind
def test_no_rows_at_all(kind):
    """As of an expert that no token was routed to."""
    of = Owners(torch.zeros(0, dtype=torch.int64), 3)
    some, rows = KINDS[kind](4)
    none = cropped(some, 0).regrouped(of)
    nothing = torch.zeros(3, *rows.shape[1:], dtype=torch.float64)
    assert_term(none, nothing)
    assert_term(none.compact(), nothing)
    others = owners([1, 0, 3])
    assert_term(combine([none, some.regrouped(others)]), summed(rows, others))


def test_an_infinite_row_stays_with_its_owner():
    of = owners([3, 2, 1, 2])
    term, rows = linear(8)
    term.backprops[of.of == 1] = torch.inf
    norms = term.regrouped(of).squared_norm()
    assert norms.isfinite().tolist() == [True, False, True, True]
    want = summed(rows, of).flatten(1).square().sum(1)
    assert relative(norms[[0, 2, 3]], want[[0, 2, 3]]) <= 1e-9


@every_kind
def test_owners_of_several_dimensions(kind):
    of = Owners(owners([2, 3, 1]).of.view(3, 2), 3)
    term, rows = KINDS[kind](6)
    assert_term(term.regrouped(of), summed(rows, of))


@every_kind
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (3, 1), (2, 2)])
def test_the_same_as_folding_where_the_order_is_regular(kind, outer, inner):
    term, _ = KINDS[kind](outer * 2 * inner)
    of = Owners.regular(Layout(0, outer, inner), 2, torch.device("cpu"))
    folded = term.fold(outer, 2, inner)
    assert_term(term.regrouped(of), folded.dense(slice(0, 2)))


@every_kind
def test_regrouped_and_folded_again(kind):
    inner, outer = owners([2, 0, 1, 3, 1, 2], 1), owners([3, 0, 2], 1)
    term, rows = KINDS[kind](len(inner.of))
    want = summed(summed(rows, inner), outer)
    assert_term(term.regrouped(inner).regrouped(outer), want)
    assert_term(term.regrouped(inner).fold(3, 1, 2), summed(rows, inner).sum(0, keepdim=True))
    assert_term(term.regrouped(inner).fold(1, 3, 2), summed(rows, inner).unflatten(0, (3, 2)).sum(1))


@every_kind
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lower_precision(kind, dtype):
    of = owners([3, 0, 7, 1, 2, 1], 2)
    low = in_dtype(KINDS[kind](len(of.of))[0], dtype)
    want = summed(in_dtype(low, torch.float64).dense(slice(0, len(of.of))), of)
    term = low.regrouped(of)
    norms = term.squared_norm()
    assert norms.dtype == torch.float32
    tolerance = TOLERANCE[dtype] if kind == "bilinear" else 1e-4  # which rounds the products of its inputs
    assert float(norms[1]) == 0
    has_rows = torch.arange(6) != 1
    assert relative(norms[has_rows], want.flatten(1).square().sum(1)[has_rows]) <= tolerance
    assert term.dense(slice(0, 3)).dtype == torch.float32
    weights = tensor(6, seed=7)
    sums = term.weighted_sum(weights.float()).double()
    scale = torch.tensordot(weights.abs(), want.abs(), 1)
    assert bool(((sums - torch.tensordot(weights, want, 1)).abs() <= TOLERANCE[dtype] * (scale + 1)).all())


def test_wants_one_owner_a_row():
    with pytest.raises(ValueError, match="6 rows cannot be regrouped by 5 owners"):
        linear(6)[0].regrouped(owners([2, 3]))


def test_refuses_a_local_correction():
    (fc, _), (conv, _) = linear(3), convolution(3)
    fc.correction = correction(3, 4, (6,), (6,))
    conv.correction = correction(3, 4, (2, 2, 2), (2, 2, 2))
    for term in (fc, conv):
        with pytest.raises(ValueError, match="correction cannot be folded or regrouped"):
            term.regrouped(owners([2, 1]))


def test_a_term_of_ones_own_says_what_it_lacks():
    class Mine(Term):
        examples = 3

    with pytest.raises(TypeError, match="Mine must define _regrouped"):
        Mine().regrouped(owners([2, 1]))


# -- memory and time --------------------------------------------------------------------------------------------------


def recorded(monkeypatch, kind):
    """Bytes of every copy of rows that a kind of term makes."""
    copied, selected = [], kind.selected

    def recording(self, rows, padding):
        found = selected(self, rows, padding)
        copied.append(sum(tensor.nbytes for tensor in found.held()))
        return found

    monkeypatch.setattr(kind, "selected", recording)
    return copied


@pytest.mark.parametrize("bound", [1, 1 << 12, 1 << 16])
@pytest.mark.parametrize("kind", ["linear", "bilinear", "embedding with padding", "tied", "conv2d", "conv3d"])
def test_copies_no_more_rows_at_once_than_it_may(kind, bound, monkeypatch):
    monkeypatch.setattr(engm.terms.scattered, "GATHERED_BYTES", bound)
    of = owners([0, 1, 2, 3, 5, 8, 8, 30, 31, 60], 3)
    term, rows = KINDS[kind](len(of.of))
    copied = recorded(monkeypatch, type(term))
    want = summed(rows, of)
    assert relative(term.regrouped(of).squared_norm(), want.flatten(1).square().sum(1)) <= 1e-9
    a_row = sum(tensor.nbytes for tensor in term.held()) // len(of.of)
    assert max(copied) <= max(bound, want[0].nbytes, a_row)


def test_examples_of_one_to_a_thousand_rows(monkeypatch):
    of = owners(range(1, 1001))
    a, b = torch.randn(len(of.of), 1, 3), torch.randn(len(of.of), 1, 2)
    copied = recorded(monkeypatch, LinearFactors)
    monkeypatch.setattr(engm.terms.scattered, "GATHERED_BYTES", 1 << 20)
    norms = LinearFactors(a, b).regrouped(of).squared_norm()
    rows = torch.zeros(1000, 2, 3, dtype=torch.float64).index_add_(0, of.of, (b.mT @ a).double())
    assert relative(norms, rows.flatten(1).square().sum(1)) <= 1e-4
    assert max(copied) <= 1 << 20
    assert sum(copied) <= 1.5 * (a.nbytes + b.nbytes)
    assert len(copied) <= 20 + sum(copied) // (1 << 19)


def test_as_many_copies_for_many_examples_as_for_few(monkeypatch):
    copied = recorded(monkeypatch, LinearFactors)
    of = owners([1, 2, 3, 4] * 5000)
    term = LinearFactors(torch.randn(len(of.of), 1, 2), torch.randn(len(of.of), 1, 2)).regrouped(of)
    began = time.process_time()
    term.squared_norm()
    assert len(copied) <= 4
    assert time.process_time() - began < 2


def test_a_table_is_formed_only_where_it_is_small_and_may_be_dense():
    of = owners([9, 11])
    for size, sparse, kind in ((4, False, PerExampleGradient), (400, False, Scattered), (4, True, Scattered)):
        rows = EmbeddingFactors(torch.randint(4, (20, 3)), tensor(20, 3, 5), size, sparse=sparse)
        term = rows.regrouped(of).compact()
        assert type(term) is kind
        assert term.weighted_sum(torch.ones(2)).is_sparse == sparse


def test_the_owners_are_sorted_once(monkeypatch):
    of, calls = owners([2, 1]), []
    argsort = torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, "argsort", lambda *a, **k: calls.append(1) or argsort(*a, **k))
    for seed in range(3):
        linear(3, seed=seed)[0].regrouped(of).squared_norm()
    assert len(calls) == 1


# -- several uses -----------------------------------------------------------------------------------------------------

USES = st.lists(st.tuples(st.sampled_from(sorted(OF_ONE_SHAPE)), st.booleans(), COUNTS), min_size=2, max_size=4)


@given(uses=USES, n=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_mixture_of_scattered_and_regular_uses(uses, n, seed):
    terms, want = [], 0
    for k, (kind, scattered, counts) in enumerate(uses):
        of = owners((counts * n)[:n] if scattered else [1] * n, int(scattered), seed + k)
        term, rows = OF_ONE_SHAPE[kind](len(of.of), seed=seed + 3 * k)
        terms.append(term.regrouped(of) if scattered else term)
        want = want + (summed(rows, of) if scattered else rows)
    term = combine(terms)
    assert_term(term, want)
    assert_term(term.compact(), want)


@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=5), n=st.integers(1, 4), seed=st.integers(0, 9))
def test_uses_of_different_lengths_are_joined_in_factors(lengths, n, seed):
    of = [owners([2] * n, 1, seed + k) for k in range(len(lengths))]
    pairs = [
        linear(len(own.of), positions, seed + k) for k, (own, positions) in enumerate(zip(of, lengths, strict=True))
    ]
    regular, of_regular = linear(n, 4, seed + 50)
    term = combine([*(term.regrouped(own) for (term, _), own in zip(pairs, of, strict=True)), regular])
    assert isinstance(term, Scattered)
    assert isinstance(term.rows, LinearFactors)
    assert_term(term, sum(summed(rows, own) for (_, rows), own in zip(pairs, of, strict=True)) + of_regular)


def test_many_uses_are_joined_at_once(monkeypatch):
    of = [owners([1, 2], 0, seed) for seed in range(400)]
    terms = [LinearFactors(tensor(3, 1, 6, seed=k), tensor(3, 1, 4, seed=k + 1)) for k in range(400)]
    want = sum(summed(term.dense(slice(0, 3)), own) for term, own in zip(terms, of, strict=True))
    calls, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda *a, **k: calls.append(1) or cat(*a, **k))
    term = combine([term.regrouped(own) for term, own in zip(terms, of, strict=True)])
    assert len(calls) == 3
    monkeypatch.undo()
    assert term.rows.activations.shape == (1200, 1, 6)
    assert_term(term, want)


def test_convolutions_of_equal_images_are_joined_in_factors():
    of = owners([2, 0, 3], 1)
    (scattered, rows), (plain, of_plain) = convolution(6), convolution(3, seed=5)
    term = combine([scattered.regrouped(of), plain, scattered.regrouped(of)])
    assert isinstance(term, Scattered)
    assert isinstance(term.rows, ConvFactors)
    assert_term(term, 2 * summed(rows, of) + of_plain)


def test_convolutions_of_different_images():
    of = owners([2, 1])
    (scattered, rows), (plain, of_plain) = convolution(3), convolution(2, stride=2)
    folded, of_folded = convolution(4)
    term = combine([scattered.regrouped(of), plain, folded.fold(1, 2, 2)])
    assert isinstance(term, MixedTerm)
    assert_term(term, summed(rows, of) + of_plain + of_folded.unflatten(0, (2, 2)).sum(1))


@pytest.mark.parametrize("bound", [1, 1 << 10, 1 << 20])
@pytest.mark.parametrize("pair", [("linear", "embedding with padding"), ("linear", "whole"), ("conv2d", "narrow")])
@given(counts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8), seed=st.integers(0, 9))
def test_uses_of_two_kinds(pair, bound, counts, seed):
    """Of some examples one has no rows, or neither has, or more than may be copied at once."""
    kinds = KINDS | {"narrow": lambda n, seed=0: convolution(n, 2, 2, seed, groups=2)}
    of = [owners(list(numbers), 1, seed + k) for k, numbers in enumerate(zip(*counts, strict=True))]
    pairs = [kinds[kind](len(own.of), seed=seed + k) for k, (kind, own) in enumerate(zip(pair, of, strict=True))]
    want = sum(summed(rows, own) for (_, rows), own in zip(pairs, of, strict=True))
    with mock.patch.object(engm.terms.scattered, "GATHERED_BYTES", bound):
        assert_term(combine([term.regrouped(own) for (term, _), own in zip(pairs, of, strict=True)]), want)


@pytest.mark.parametrize("regular", [False, True])
def test_a_large_table_tied_to_a_projection_forms_no_gradient(regular, monkeypatch):
    """A language model on sequences of many lengths; look-ups or projections may be in order all the same."""
    size, n = 5000, 4
    of = owners([1] * n if regular else [3, 1, 0, 7], 0, 1), owners([2, 1, 4, 7], 0, 2)
    (table, _), (projection, _) = (
        kind(len(own.of), positions=1, seed=3, shape=(size, 3))
        for kind, own in zip((embedding, linear), of, strict=True)
    )
    uses = [table if regular else table.regrouped(of[0]), projection.regrouped(of[1])]
    want = summed(table.dense(slice(0, len(of[0].of))), Owners.regular(PLAIN, n, "cpu") if regular else of[0])
    want = (want + summed(projection.dense(slice(0, len(of[1].of))), of[1])).flatten(1).square().sum(1)
    for kind in (EmbeddingFactors, LinearFactors, TiedTable):
        monkeypatch.setattr(kind, "dense", lambda *_: pytest.fail("a gradient of the table's size was formed"))
    for order in (uses, uses[::-1]):
        assert relative(combine(order).squared_norm(), want) <= 1e-9


def test_tied_tables():
    of = owners([2, 0, 1])
    pairs = [KINDS["tied"](3, seed=seed) for seed in range(2)]
    term = combine([term.regrouped(of) for term, _ in pairs])
    assert isinstance(term.rows, TiedTable)
    assert_term(term, summed(pairs[0][1] + pairs[1][1], of))


def test_what_is_worked_out_of_owners_is_kept_and_bounded():
    """Owners of a plan are those of every step; others may be new at every step."""
    own, other = owners([2, 0, 3], 1), owners([1, 1, 1])
    assert own.behind_one_another([own, other], [2, 1]) is own.behind_one_another([own, other], [2, 1])
    assert own.batches(0, 3, 100) is own.batches(0, 3, 100)
    for k in range(200):
        new = owners([1, 1, 1], seed=k)
        found = Owners.behind_one_another([own, new], [1, 1])
        assert found.of.tolist() == own.of.tolist() + new.of.tolist()
    assert len(own._kept) <= engm.terms.owners.MOST_KEPT
    assert {id(tensor) for tensor in own.tensors()} >= {id(own.of), id(own.sorted_rows.order)}
