"""Terms of a parameter that is used through tensors computed from it, regrouped to the examples that own the rows."""

import torch
from oracle import tensor
from term_kinds import assert_term, linear

from engm.rules.pulled_back import Derived, Origin, Pieces
from engm.terms import LinearFactors, Owners

OWNERS = Owners(torch.tensor([2, 0, 2, -1, 0, 2]), 3)


def summed(rows):
    """``[n, *shape]``: the gradients of the rows, added by owner."""
    total = rows.new_zeros(OWNERS.n + 1, *rows.shape[1:])
    return total.index_add(0, OWNERS.of % (OWNERS.n + 1), rows)[: OWNERS.n]


def test_of_a_tensor_computed_from_the_parameter():
    parameter = tensor(6, 4, seed=9).requires_grad_()
    of_tensor, rows = linear(6)
    for computed, pulled, rearranged in ((parameter.t(), rows.mT, True), (2 * parameter.t(), 2 * rows.mT, False)):
        term = Derived([(Origin(computed.grad_fn, 0, rearranged), of_tensor)], parameter).regrouped(OWNERS)
        assert_term(term, summed(pulled))
        assert_term(term.compact(), summed(pulled))


def test_of_pieces_of_the_parameter():
    parameter = tensor(4, 6, seed=9).requires_grad_()
    term, rows = linear(6)
    pieces = []
    for part in (slice(0, 1), slice(1, 4)):
        own = LinearFactors(term.activations, term.backprops[:, :, part])
        pieces.append(Derived([(Origin(parameter[part].grad_fn, 0, True), own)], parameter))
    regrouped = Pieces(pieces).regrouped(OWNERS)
    assert isinstance(regrouped, Pieces)
    assert_term(regrouped, summed(rows))
    assert_term(regrouped.compact(), summed(rows))
