"""Where examples lie in a tensor, from the owners of those of its rows that got a gradient."""

import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from engm.graph.arrangement import arranged
from engm.rules.entries import owners_of
from engm.terms.layout import Layout
from engm.terms.owners import NOBODY


@st.composite
def laid_out(draw):
    """Owners of all rows of a tensor, along one of its dimensions, and how many examples there are."""
    n, outer, inner = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = draw(st.lists(st.integers(1, 5), max_size=3))
    dim = draw(st.integers(0, len(shape)))
    shape.insert(dim, outer * n * inner)
    along = torch.arange(n).repeat_interleave(inner).repeat(outer)
    return along.view([-1 if other == dim else 1 for other in range(len(shape))]).expand(shape), dim, n


def known(owners, n):
    """What is said of every row: its owner, and whether that is not known."""
    found = arranged(owners, n)
    of = owners_of(found.ownership, tuple(owners.shape), n, owners.device).of
    of = of.view([*of.shape, *[1] * (owners.dim() - of.dim())]).expand_as(owners)
    return found, of, torch.zeros_like(owners, dtype=torch.bool) if found.unknown is None else found.unknown


@given(laid_out())
def test_a_layout_is_found_along_any_dimension(drawn):
    owners, dim, n = drawn
    found, of, unknown = known(owners, n)
    assert torch.equal(of, owners)
    assert not unknown.any()
    assert isinstance(found.ownership, Layout) or dim > 1 or n == 1


@given(laid_out(), st.integers(0, 2**32 - 1), st.floats(0, 0.9))
@example((torch.arange(3).view(1, 1, 3, 1).expand(1, 4, 3, 3), 2, 3), 0, 0.5)
def test_what_is_said_of_rows_without_a_gradient_is_right_or_not_known(drawn, seed, share):
    owners, _, n = drawn
    silent = torch.rand(owners.shape, generator=torch.Generator().manual_seed(seed)) < share
    seen = torch.where(silent, NOBODY, owners)
    assume(bool((seen != NOBODY).any()))
    _, of, unknown = known(seen, n)
    assert torch.equal(of[~silent], owners[~silent])
    told = silent & ~unknown
    assert bool((of[told] == owners[told]).all())


def test_words_of_which_one_place_alone_is_read():
    """As queries of the last layer of a reader, beside keys and values of all words but padding."""
    owners = torch.arange(4).view(1, 1, 4, 1).repeat(1, 6, 1, 3)
    owners[:, 1:, :, 0] = NOBODY  # queries
    owners[:, 3:, 2] = NOBODY  # padding
    _, of, unknown = known(owners, 4)
    assert not unknown.any()
    assert torch.equal(of, torch.arange(4).view(1, 1, 4, 1).expand(1, 6, 4, 3))
    owners[:, 1:] = NOBODY  # nothing tells of the other places
    assert known(owners, 4)[2][:, 1:].all()
