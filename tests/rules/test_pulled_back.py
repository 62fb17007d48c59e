"""Terms of a parameter that is used through tensors computed from it, regrouped to the examples that own the rows."""

import pytest
import torch
from engine_checks import check
from oracle import tensor
from term_kinds import assert_term, linear
from torch import nn
from torch.autograd.graph import get_gradient_edge

from engm.rules.pulled_back import Derived, Origin, Pieces, derived_term, pull_back
from engm.terms import LinearFactors, Owners, PerExampleGradient

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
        pieces.append((Origin(parameter[part].grad_fn, 0, True), own))
    regrouped = Pieces(pieces, parameter).regrouped(OWNERS)
    assert isinstance(regrouped, Pieces)
    assert_term(regrouped, summed(rows))
    assert_term(regrouped.compact(), summed(rows))


def test_which_pieces_are_disjoint():
    def kind(*pieces):
        uses = [
            (Origin(piece.grad_fn, piece.output_nr, True), PerExampleGradient(tensor(2, *piece.shape)))
            for piece in pieces
        ]
        return type(derived_term(uses, parameter))

    parameter = tensor(4, 6, seed=9).requires_grad_()
    assert kind(*parameter.split(2)) is Pieces
    assert kind(*parameter.unbind(1)) is Pieces
    assert kind(parameter[0], parameter[-1], parameter[2]) is Pieces
    assert kind(parameter[:2], parameter[2:]) is Pieces
    assert kind(parameter[0], parameter[-4]) is Derived
    assert kind(parameter[3], parameter[-1]) is Derived
    assert kind(parameter[0], parameter[:, 0]) is Derived
    assert kind(parameter.split(2)[0], parameter.split(3)[1]) is Pieces
    assert kind(parameter.split(2)[1], parameter.split(1)[2]) is Derived


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2, 3)])
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.filterwarnings("error")
def test_weight_norm(shape, dim):
    """Of which torch knows no batched backward pass; nobody is warned of that."""
    v = tensor(*shape, seed=1).requires_grad_()
    kept = dim % len(shape)
    g = tensor(*(size if k == kept else 1 for k, size in enumerate(shape)), seed=2).requires_grad_()
    weight, doubled = (torch._weight_norm_interface(by * v, g, kept)[0] for by in (1, 2))
    gradients = tensor(5, *shape, seed=3)
    for made, parameter in (([weight], v), ([weight], g), ([doubled, weight], v)):
        wanted = [torch.autograd.grad(made, parameter, [one] * len(made), retain_graph=True)[0] for one in gradients]
        found = pull_back([get_gradient_edge(w) for w in made], parameter, [gradients] * len(made))
        torch.testing.assert_close(found, torch.stack(wanted))


def test_nothing_but_rounding_comes_to_a_parameter_by_way_of_one_number():
    """A shift of all numbers does not change how far they are spread."""
    for seed in range(8):
        weight, shift = tensor(4, 3, seed=seed), tensor(1, seed=seed + 1).requires_grad_()
        spread = (weight + shift).std()
        found = pull_back([get_gradient_edge(spread)], shift, [tensor(5, seed=seed + 2)])
        assert found.shape == (5, 1)
        assert float(found.abs().max()) < 1e-14


def test_parts_are_let_go_of_once_norms_are_taken():
    """They may be formed gradients of all examples, while the terms wait for their weights."""
    parameter = tensor(4, 6, seed=9).requires_grad_()
    computed, (of_tensor, _) = parameter.tanh(), linear(6)
    term = derived_term([(Origin(computed.grad_fn, 0, False), of_tensor)], parameter)
    pull = term.pull
    assert pull.parts_of(parameter) is not None
    term.squared_norm()
    assert pull.parts_of(parameter) is None
    assert pull.knows(parameter)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_parameter_that_enters_alone_and_by_a_product(n):
    """The other factor of the product enters by that alone."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 5)
            self.one, self.other = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5, 5))

        def forward(self, x):
            hidden = torch.tanh(torch.tanh(self.first(x)) @ (self.one * self.other))
            return hidden * (1 + (self.one * torch.ones((), dtype=x.dtype))[1])

    torch.manual_seed(0)
    x = torch.randn(n, 4).double()
    check(Net().double(), lambda net: net(x).square().sum(1))


class Clipped(torch.autograd.Function):
    """Hands on its input, and backwards the gradient, element by element no larger than 1."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-1, 1)


@pytest.mark.parametrize("hooked", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_what_clips_gradients_of_a_parameter_is_refused_however_few_examples_are_pulled_back_at_once(
    chunk, hooked, monkeypatch
):
    """No example's gradient is clipped, but their sum is."""
    parameter = tensor(6, 4).requires_grad_()
    computed = (2 * parameter).clone() if hooked else Clipped.apply(parameter)
    if hooked:
        computed.register_hook(lambda gradient: gradient.clamp(-1, 1))
    monkeypatch.setattr("engm.rules.pulled_back.CHUNK_BYTES", chunk * parameter.nbytes)
    monkeypatch.setattr("engm.terms.base.CHUNK_BYTES", chunk * parameter.nbytes)
    for size, refused in ((0.4, True), (1e-3, False)):
        gradients = torch.full((8, 6, 4), size, dtype=torch.float64)
        made = [(Origin(computed.grad_fn, 0, False), PerExampleGradient(gradients))]
        term = Derived(made, parameter)
        if refused:
            with pytest.raises(RuntimeError, match="do not add up to the gradient"):
                term.squared_norm()
        else:
            torch.testing.assert_close(term.squared_norm(), gradients.flatten(1).square().sum(1) * (4 if hooked else 1))
