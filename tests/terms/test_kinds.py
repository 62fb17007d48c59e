"""Every kind of term against its own gradients, formed by autograd: dense, norms, sums, folding of rows, uses added."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import relative, tensor
from term_kinds import (
    CONVOLVE,
    KINDS,
    OF_ONE_SHAPE,
    TRANSPOSE,
    assert_term,
    convolution,
    correction,
    embedding,
    every_kind,
    gradients,
    linear,
    stacked,
    tied,
    whole,
)

import engm.terms.base
import engm.terms.combination
import engm.terms.embedding
import engm.terms.linear
from engm.terms import (
    ConvFactors,
    ConvGeometry,
    EmbeddingFactors,
    LinearFactors,
    MixedTerm,
    PerExampleGradient,
    Stacked,
    Term,
    TiedTable,
    combine,
)
from engm.terms.convolution import MOST_PADDED, joined_convolutions


@every_kind
@pytest.mark.parametrize("n", [1, 5])
def test_agrees_with_autograd(kind, n):
    term, want = KINDS[kind](n)
    assert_term(term, want)
    compact = term.compact()
    assert_term(compact, want)


@every_kind
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (3, 1), (1, 3), (2, 2)])
def test_folding_rows_of_one_example(kind, outer, inner):
    n = 2
    term, rows = KINDS[kind](outer * n * inner)
    term.compact().squared_norm()  # what is kept of the rows' norms must not survive
    want = rows.unflatten(0, (outer, n, inner)).sum((0, 2))
    folded = term.fold(outer, n, inner)
    assert (folded is term) == (outer * inner == 1)
    assert_term(folded, want)
    assert_term(folded.compact(), want)
    if outer == inner == 2:
        assert_term(term.fold(1, 4, 2).fold(2, 2, 1), want)


def test_norms_of_rows_do_not_survive_folding():
    g = tensor(6, 3)
    folded = PerExampleGradient(g, g.square().sum(1)).fold(1, 2, 3)
    assert relative(folded.squared_norm(), g.view(2, 3, 3).sum(1).square().sum(1)) <= 1e-12


def test_folding_wants_the_number_of_rows():
    with pytest.raises(ValueError, match="6 rows cannot be folded to 2 x 2 x 2"):
        whole(6)[0].fold(2, 2, 2)


@every_kind
def test_formed_in_chunks(kind, monkeypatch):
    for module in (engm.terms.base, engm.terms.embedding, engm.terms.linear):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    assert_term(*KINDS[kind](3))


# -- several uses -----------------------------------------------------------------------------------------------------


@given(
    uses=st.lists(st.sampled_from(sorted(OF_ONE_SHAPE)), min_size=1, max_size=4),
    n=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_mixture_of_uses_of_a_matrix(uses, n, seed):
    pairs = [OF_ONE_SHAPE[kind](n, seed=seed + 3 * k) for k, kind in enumerate(uses)]
    want = torch.stack([gradient for _, gradient in pairs]).sum(0)
    term = combine([term for term, _ in pairs])
    assert_term(term, want)
    assert_term(term.compact(), want)


def test_uses_of_a_stack_are_joined_matrix_by_matrix():
    pairs = [stacked(3, seed=seed) for seed in range(3)]
    want = torch.stack([gradient for _, gradient in pairs]).sum(0)
    term = combine([term for term, _ in pairs])
    assert isinstance(term, Stacked)
    assert_term(term, want)
    whole = tensor(3, 2, 4, 6)
    assert_term(combine([*(term for term, _ in pairs), PerExampleGradient(whole)]), want + whole)


@pytest.mark.parametrize(
    ("uses", "kind"),
    [
        ([linear, linear], LinearFactors),
        ([embedding, embedding], EmbeddingFactors),
        ([whole, whole], PerExampleGradient),
        ([embedding, linear, embedding], TiedTable),
        ([linear, embedding], TiedTable),
        ([linear, whole], MixedTerm),
        ([linear, whole, embedding], MixedTerm),
    ],
)
def test_kept_in_factors_where_that_can_be(uses, kind):
    assert type(combine([use(3)[0] for use in uses])) is kind


@given(
    uses=st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=2, max_size=4),
    dims=st.integers(1, 3),
    n=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_convolutions_of_different_strides_and_directions(uses, dims, n, seed):
    """The weight ``[2, 2, *kernel]`` of a convolution is also that of a transposed one."""

    def use(stride, transposed, seed):
        apply = (TRANSPOSE if transposed else CONVOLVE)[dims]
        x, geometry = tensor(n, 2, *[4, 3, 3][:dims], seed=seed), ((2,) * dims, (stride,) * dims, (1,) * dims)
        options = {"stride": stride, "padding": 1}
        gy = tensor(*apply(x, tensor(2, 2, *geometry[0]), **options).shape, seed=seed + 1)
        want = gradients((2, 2, *geometry[0]), lambda w, i: apply(x[i : i + 1], w, **options), gy.unsqueeze(1))
        pair = (gy, x) if transposed else (x, gy)
        return ConvFactors(*pair, ConvGeometry(*geometry, (1,) * dims, 1), transposed=transposed), want

    pairs = [use(stride, transposed, seed + 2 * k) for k, (stride, transposed) in enumerate(uses)]
    assert_term(combine([term for term, _ in pairs]), torch.stack([want for _, want in pairs]).sum(0))


@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=4), seed=st.integers(0, 9))
def test_convolutions_of_images_of_any_size(sizes, seed):
    def use(size, seed):
        x, gy = tensor(3, 2, *size, seed=seed), tensor(3, 4, *(length + 1 for length in size), seed=seed + 1)
        want = gradients((4, 2, 2, 2), lambda w, i: CONVOLVE[2](x[i : i + 1], w, padding=1), gy.unsqueeze(1))
        return ConvFactors(x, gy, ConvGeometry((2, 2), (1, 1), (1, 1), (1, 1), 1)), want

    pairs = [use(size, seed + 2 * k) for k, size in enumerate(sizes)]
    terms = [term for term, _ in pairs]
    joined = joined_convolutions(terms)
    pixels = sum(term.backprops.shape[2:].numel() for term in terms)
    assert sum(term.backprops.shape[2:].numel() for term in joined) <= MOST_PADDED * pixels + 12 * len(terms)
    assert_term(combine(terms), torch.stack([want for _, want in pairs]).sum(0))


def test_strips_are_not_filled_up_to_an_image():
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    strips = [ConvFactors(tensor(2, 3, *size), tensor(2, 4, *size), geometry) for size in ((40, 1), (1, 40))]
    assert joined_convolutions(strips) == strips
    pyramid = [ConvFactors(tensor(2, 3, size, size), tensor(2, 4, size, size), geometry) for size in (16, 8, 4, 2)]
    assert len(joined_convolutions(pyramid)) == 1


def test_folded_and_plain_uses_of_a_convolution():
    (rows, of_rows), (plain, of_plain) = convolution(6, seed=3), convolution(2)
    term = combine([rows.fold(1, 2, 3), plain])
    assert_term(term, of_rows.unflatten(0, (2, 3)).sum(1) + of_plain)


def test_float32_norms_of_a_tied_table():
    term, want = tied(4, 6, shape=(200, 8))
    low = TiedTable(
        EmbeddingFactors(term.embedding.indices, term.embedding.backprops.float(), 200),
        LinearFactors(term.linear.activations.float(), term.linear.backprops.float()),
    )
    assert low.squared_norm().dtype == torch.float32
    assert relative(low.squared_norm(), want.flatten(1).square().sum(1)) <= 2e-5


def test_a_tied_table_forms_no_gradient_of_its_size(monkeypatch):
    term, want = tied(2, 3, shape=(500, 8))
    monkeypatch.setattr(TiedTable, "dense", lambda *_: pytest.fail("formed"))
    assert relative(term.squared_norm(), want.flatten(1).square().sum(1)) <= 1e-9


# -- local correction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_dense_gradients_are_corrected(groups):
    conv, _ = convolution(3, groups=groups)
    conv.correction = correction(3, 4, (2, 2, 2), (2 // groups, 2, 2))
    fc, _ = linear(3)
    fc.correction = correction(3, 4, (6,), (6,))
    for term in (conv, fc):
        dense = term.dense(slice(0, 3))
        assert relative(term.squared_norm(), dense.flatten(1).square().sum(1)) <= 1e-9
        torch.testing.assert_close(term.dense(slice(1, 3)), dense[1:])
        with pytest.raises(ValueError, match="correction cannot be folded"):
            term.fold(1, 1, 3)
        assert term.fold(1, 3, 1) is term


@pytest.mark.parametrize(
    "ask",
    [
        lambda term: term.squared_norm(),
        lambda term: term.weighted_sum(torch.ones(1)),
        lambda term: term.dense(slice(0, 1)),
        lambda term: term.examples,
        lambda term: term.fold(1, 1, 1),
    ],
)
def test_a_term_of_ones_own_says_what_it_lacks(ask):
    class Mine(Term):
        pass

    with pytest.raises(TypeError, match="Mine must define"):
        ask(Mine())
