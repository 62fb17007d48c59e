"""A tensor that enters at one node, whoever owns the elements of the node's output: the engine's term and the truth.

The truth is the node's own backward pass (and whatever autograd has behind it), once for every example on the gradient
of that example's elements alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engm._C import slot_of
from engm.rules.any_operator import masked_gradients
from engm.rules.entries import Entry, entry_term, owners_of
from engm.terms import Term
from engm.terms.owners import Ownership
from engm.torch_internals import node_outputs


def random_owners(shape: tuple[int, ...], n: int, seed: int = 0) -> Tensor:
    """Owners of any rows, of which some belong to nobody and some examples may have none."""
    return torch.randint(-1, n, shape, generator=torch.Generator().manual_seed(seed))


def own_gradients(output: Tensor, entering: Tensor, gradient: Tensor, where: Ownership, n: int) -> Tensor:
    """``[n, *entering.shape]`` by one backward pass an example."""
    owner = owners_of(where, tuple(output.shape), n, output.device).elements(output.dim())
    found = []
    for example in range(n):
        seed = torch.where(owner == example, gradient, 0)
        (own,) = torch.autograd.grad(output, entering, seed, retain_graph=True, allow_unused=True)
        found.append(torch.zeros_like(entering) if own is None else own)
    return torch.stack(found)


def entry_at(output: Tensor, entering: Tensor, where: Ownership, n: int) -> Entry:
    """Where ``entering``, which the output's own node takes, or takes the transpose of, enters."""
    node = output.grad_fn
    transposed = not any(
        child is not None and getattr(child, "variable", None) is entering for child, _ in node.next_functions
    )
    if not transposed:
        return Entry(node, slot_of(output, entering), tuple(entering.shape), where, n)
    slot = next(
        k for k, (child, _) in enumerate(node.next_functions) if child is not None and "TBackward" in child.name()
    )
    return Entry(node, slot, tuple(entering.shape), where, n, turns=1)


def assert_term(term: Term, truth: Tensor) -> None:
    """A term has these gradients, their norms and their weighted sums, also in the form in which it is kept."""
    n = len(truth)
    weights = torch.linspace(0.5, 1.5, n, dtype=torch.float64)
    total = torch.tensordot(weights.to(truth.dtype), truth, 1)
    norms = truth.abs().square().reshape(n, truth[0].numel()).sum(1).sqrt()
    for form in (term, term.compact()):
        assert form.examples == n
        assert_near(form.dense(slice(0, n)), truth)
        assert_near(form.squared_norm().sqrt(), norms)
        assert_near(form.weighted_sum(weights), total)


def assert_near(value: Tensor, expected: Tensor) -> None:
    assert value.shape == expected.shape
    assert value.is_complex() == expected.is_complex()
    assert float((value - expected).norm()) <= 1e-10 * (1 + float(expected.norm()))


def check_entry(output: Tensor, entering: Tensor, where: Ownership, n: int, *, ruled: bool | None = True) -> None:
    """The operator's rule, if it has one that holds, and the backward pass that is run once an example are right.

    Args:
        output: of the operator.
        entering: a leaf.
        where: the owners of the output's elements.
        n: number of examples.
        ruled: whether there must be a rule that holds; None where that does not matter.
    """
    numbers = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, dtype=output.dtype, generator=numbers)
    truth = own_gradients(output, entering, gradient, where, n)
    entry = entry_at(output, entering, where, n)
    term = entry_term(entry, [gradient])
    assert ruled is None or (term is not None) == ruled
    if term is not None:
        assert_term(term, truth)
    others = [None] * (len(node_outputs(output.grad_fn)) - 1)
    assert_term(masked_gradients(entry, [gradient, *others]), truth)
