"""Per-example gradients of a parameter that is not used as it is, but through tensors computed from it.

Such tensors are made by ``weight_norm``, ``spectral_norm`` and other parametrizations, by autocast, by cutting a weight
into pieces or interpolating a position table. For each of them there is a term, whose gradients autograd pulls back to
the parameter. A weighted sum is pulled back once. Norms need the gradient of every example pulled back: in factors,
where the operators in between allow it (:mod:`engm.rules.in_factors`), else one by one. Where the tensor only
rearranges elements of the parameter, norms are as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._C import is_hooked
from ..checks import RefusedError
from ..terms import CHUNK_BYTES, MixedTerm, Owners, Term, combine, squared_norm_of_dense, squared_rows
from ..terms.combination import sum_of
from ..terms.parts import Part, dense_of, squared_norm_of
from ..torch_internals import (
    computed_anew,
    decided,
    is_opaque,
    leaf_of,
    node_name,
    node_outputs,
    operator_name,
    recomputed_once,
    saved_option,
)
from .any_operator import backward_of_each
from .in_factors import FactoredPull, in_order
from .same_tensor import same_tensors


@dataclass(frozen=True)
class Origin:
    """The tensor that entered the batch's computation, as an edge of the graph.

    Attributes:
        node: the node that made the tensor.
        number: which output of the node.
        rearranged: whether the tensor consists of elements of the parameter, each at most once.
    """

    node: Any
    number: int
    rearranged: bool

    @property
    def edge(self) -> GradientEdge:
        """The tensor as autograd takes it for an output to differentiate."""
        return GradientEdge(self.node, self.number)


@dataclass
class Derived(Term):
    """The term of a parameter, from the terms of tensors that were computed from the parameter.

    Attributes:
        uses: the tensors and their terms.
        parameter: the parameter.
        pull: what pulls these terms back in factors; None where only autograd does.
        together: what pulls them back to all parameters by autograd; None where each has terms of its own.
    """

    uses: Sequence[tuple[Origin, Term]]
    parameter: Tensor
    pull: FactoredPull | None = None
    together: PulledTogether | None = None

    @property
    def examples(self) -> int:
        return self.uses[0][1].examples

    def squared_norm(self) -> Tensor:
        if len(self.uses) == 1 and self.uses[0][0].rearranged:
            return self.uses[0][1].squared_norm()
        parts = self._parts()
        if parts is not None and self.pull is not None:
            self.pull.let_go(self.parameter)
            self.pull = None
            return squared_norm_of(parts, tuple(self.parameter.shape))
        if self.together is not None:
            return self.together.squared_norm(self.parameter)
        return squared_norm_of_dense(self, max(1, CHUNK_BYTES // max(1, self.parameter.nbytes)))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        if self.together is not None:
            return self.together.weighted_sum(self.parameter, weights)
        totals = [term.weighted_sum(weights).unsqueeze(0) for _, term in self.uses]
        return pull_back([origin.edge for origin, _ in self.uses], self.parameter, totals)[0]

    def compact(self) -> Term:
        terms = [term.compact() for _, term in self.uses] if self.pull is None else self.pull.terms
        return replace(self, uses=[(origin, term) for (origin, _), term in zip(self.uses, terms, strict=True)])

    def _parts(self) -> list[Part] | None:
        """What the gradients are the sum of, if that is known."""
        return None if self.pull is None else self.pull.parts_of(self.parameter)

    def dense(self, rows: slice) -> Tensor:
        parts = self._parts()
        if parts is not None:
            return dense_of(parts, rows)
        return _dense(self.uses, [self.parameter], rows)[0]

    def _folded(self, outer: int, n: int, inner: int) -> Term:
        return self._of([(origin, term.fold(outer, n, inner)) for origin, term in self.uses])

    def _regrouped(self, owners: Owners) -> Term:
        return self._of([(origin, term.regrouped(owners)) for origin, term in self.uses])

    def _of(self, uses: Sequence[tuple[Origin, Term]]) -> Term:
        """The same with other terms."""
        return replace(self, uses=uses, pull=None, together=None)


class Pieces(Derived):
    """The term of a parameter that is used through disjoint pieces of it, whose squared norms add up."""

    def squared_norm(self) -> Tensor:
        return torch.stack([term.squared_norm() for _, term in self.uses]).sum(0)


class PulledTogether:
    """Pulls terms back by autograd, to several parameters that the tensors were computed from, by one pass.

    Args:
        uses: the tensors, and their terms.
        pull: tells which parameters need no such pass for their norms.
        parameters: all that are accounted for by these uses. On the way to others there may be layers that account for
            them, and take what comes by.
    """

    def __init__(self, uses: Sequence[tuple[Origin, Term]], pull: FactoredPull, parameters: Sequence[Tensor]) -> None:
        self._origins, self._pull, self._parameters = [origin for origin, _ in uses], pull, parameters
        self._squared: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        self._weights: Tensor | None = None  # those of the sums

    @property
    def _uses(self) -> list[tuple[Origin, Term]]:
        return list(zip(self._origins, self._pull.terms, strict=True))

    def squared_norm(self, parameter: Tensor) -> Tensor:
        """``||g_i||^2``, ``[n]``, of a parameter."""
        if id(parameter) not in self._squared:
            wanted = [p for p in self._with(parameter) if p is parameter or not self._pull.knows(p)]
            uses = self._uses
            n, chunk = uses[0][1].examples, max(1, CHUNK_BYTES // max(1, sum(p.nbytes for p in wanted)))
            squares: list[list[Tensor]] = [[] for _ in wanted]
            for start in range(0, n, chunk):
                gradients = _dense(uses, wanted, slice(start, min(start + chunk, n)))
                for own, gradient in zip(squares, gradients, strict=True):
                    own.append(squared_rows(gradient))
            self._squared |= {id(p): torch.cat(own) for p, own in zip(wanted, squares, strict=True)}
        return self._squared[id(parameter)]

    def weighted_sum(self, parameter: Tensor, weights: Tensor) -> Tensor:
        """``sum_i weights_i g_i`` of a parameter; each is asked for once."""
        if self._weights is not weights or id(parameter) not in self._sums:
            wanted, uses = self._with(parameter), self._uses
            totals = [term.weighted_sum(weights).unsqueeze(0) for _, term in uses]
            sums = pull_back_to_all([origin.edge for origin, _ in uses], wanted, totals)
            self._weights, self._sums = weights, {id(p): found[0] for p, found in zip(wanted, sums, strict=True)}
        return self._sums.pop(id(parameter))

    def _with(self, parameter: Tensor) -> list[Tensor]:
        """The parameters of the same type."""
        return [p for p in self._parameters if p.dtype == parameter.dtype]


def _dense(uses: Sequence[tuple[Origin, Term]], parameters: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """The gradients of some examples, of all parameters, ``[rows, *shape]`` each."""
    found: list[list[Tensor]] = []
    edges, gradients, held = [], [], 0
    for place, (origin, term) in enumerate(uses):
        edges.append(origin.edge)
        gradients.append(term.dense(rows))
        held += gradients[-1].nbytes
        if held >= CHUNK_BYTES or place == len(uses) - 1:
            found.append(pull_back_to_all(edges, parameters, gradients, term.examples))
            edges, gradients, held = [], [], 0
    return [sum_of(list(parts)) for parts in zip(*found, strict=True)]


class JoinedUses:
    """Joins the terms of tensors that are one tensor, and remembers what was joined last.

    Parameters that a tensor is computed from together, as the direction and the length of a weight, have their turns
    one after the other.

    Args:
        hooked: whether hooks of the user's hang somewhere in the graph. Those on what tensors are computed by only a
            backward pass of autograd's runs.
    """

    def __init__(self, *, hooked: bool = False) -> None:
        self._hooked = hooked
        self._last: _Joined = ([], [], None, None)
        self._of: list[int] = []  # the parameters (id) that what was joined last is pulled back to

    def of(self, uses: list[tuple[Origin, Term]], parameters: Sequence[Tensor]) -> _Joined:
        """``uses``, one term for each of the different tensors in them, and what pulls these back to parameters."""
        last, found, pull, together = self._last
        places = {(origin.node, origin.number): origin for origin, _ in uses}
        before, self._of = self._of, [id(parameter) for parameter in parameters]
        if len(last) == len(uses) and all(
            (a.node, a.number) == (b.node, b.number) and s is t for (a, s), (b, t) in zip(last, uses, strict=True)
        ):
            if pull is not None and before != self._of:  # one of them is used otherwise too, another is not
                together = PulledTogether(found, pull, parameters)
                self._last = last, found, pull, together
            return uses, [(places[origin.node, origin.number], term) for origin, term in found], pull, together
        by_origin: dict[Origin, list[Term]] = {}
        for origin, term in uses:
            by_origin.setdefault(origin, []).append(term)
        origins = list(by_origin)
        terms: dict[Origin, list[Term]] = {}
        for origin, first in zip(origins, same_tensors([(o.node, o.number) for o in origins]), strict=True):
            terms.setdefault(origins[first], []).extend(by_origin[origin])
        found = [(origin, combine(own)) for origin, own in terms.items()]
        if self._hooked and any(is_hooked(n) for n in in_order([o.node for o in origins]) if leaf_of(n) is None):
            found = [(replace(origin, rearranged=False), term) for origin, term in found]
            pull = together = None
        else:
            pull = FactoredPull([((o.node, o.number), term) for o, term in found])
            together = PulledTogether(found, pull, parameters)
        self._last = uses, found, pull, together
        return self._last


_Joined = tuple[list[tuple[Origin, Term]], list[tuple[Origin, Term]], FactoredPull | None, PulledTogether | None]


def derived_term(
    uses: Sequence[tuple[Origin | None, Term]],
    parameter: Tensor,
    joined: JoinedUses | None = None,
    alike: Sequence[Tensor] = (),
) -> Term:
    """One term for all uses of a parameter.

    Args:
        uses: for each use the tensor that was used (None: the parameter itself) and that tensor's term.
        parameter: the parameter.
        joined: what joins the terms, for several parameters whose terms are asked for one after the other.
        alike: the parameters that were used through the same tensors, this one too.
    """
    own = [term for origin, term in uses if origin is None]
    known = joined or JoinedUses()
    through = [(origin, term) for origin, term in uses if origin is not None]
    _, derived, pull, together = known.of(through, alike or [parameter])
    if (
        not own
        and len(derived) > 1
        and all(origin.rearranged for origin, _ in derived)
        and _disjoint(derived, parameter)
    ):
        return Pieces(derived, parameter)
    terms = [combine(own)] if own else []
    if derived:
        terms.append(Derived(derived, parameter, pull, together))
    return terms[0] if len(terms) == 1 else MixedTerm(terms)


def _disjoint(uses: Sequence[tuple[Origin, Term]], parameter: Tensor) -> bool:
    """Whether rearranged tensors have no element of the parameter in common."""
    nodes = {origin.node for origin, _ in uses}
    if len(nodes) == 1 and operator_name(*nodes) in ("Split", "SplitWithSizes", "Unbind"):
        return True
    rows = [selected_row(node, parameter) for node in nodes]
    if None not in rows and len({dim for dim, _ in filter(None, rows)}) == 1:
        return len(set(rows)) == len(rows)
    ones = []
    for origin, _ in uses:
        meta = node_outputs(origin.node)[origin.number]
        ones.append(torch.ones(1, *meta.shape, dtype=meta.dtype, device=meta.device))
    return decided((pull_back([origin.edge for origin, _ in uses], parameter, ones)[0].real <= 1).all())


def selected_row(node: Any, parameter: Tensor) -> tuple[int, int] | None:
    """``(dim, index)`` where the node takes ``parameter.select(dim, index)``; None for other nodes."""
    if operator_name(node) != "Select" or leaf_of(node.next_functions[0][0]) is not parameter:
        return None
    dim = saved_option(node, "dim") % parameter.dim()
    return dim, saved_option(node, "index") % parameter.shape[dim]


def pull_back(edges: Sequence[GradientEdge], parameter: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """As :func:`pull_back_to_all`, of one parameter."""
    return pull_back_to_all(edges, [parameter], gradients)[0]


def pull_back_to_all(
    edges: Sequence[GradientEdge], parameters: Sequence[Tensor], gradients: Sequence[Tensor], among: int = 1
) -> list[Tensor]:
    """Gradients of parameters, from gradients of tensors that were computed from them.

    Args:
        edges: the tensors, each of a shape ``[*shape]``.
        parameters: the parameters, of one type.
        gradients: of the tensors, ``[k, *shape]`` each.
        among: how many examples the ``k`` are among.

    Returns:
        ``[k, *parameter.shape]`` each, the sums over the tensors.

    Raises:
        RuntimeError: what lies in between is not linear in the gradients.
    """
    between = _between([edge.node for edge in edges], parameters)

    def of(parts: Sequence[Tensor | None]) -> Tensor | None:
        with computed_anew(between):
            pulled = torch.autograd.grad(edges, parameters, parts, retain_graph=True, allow_unused=True)
        if len(pulled) == 1:
            return pulled[0]
        like = next((g for g in pulled if g is not None), None)
        if like is None:
            return None
        known = zip(pulled, parameters, strict=True)
        return torch.cat([like.new_zeros(p.numel()) if g is None else g.flatten() for g, p in known])

    first = parameters[0]
    alone, sizes = len(parameters) == 1, [p.numel() for p in parameters]
    linear = not any(is_opaque(node) or is_hooked(node) for node in between)
    with recomputed_once():
        with computed_anew(between):
            pass  # here, because vmap runs no checkpoint again
        found = backward_of_each(
            of,
            gradients,
            tuple(first.shape) if alone else (sum(sizes),),
            is_complex=first.is_complex(),
            sizes=None if alone else sizes,
            nonlinear=partial(_nonlinear, edges),
            among=1 if linear else among,
        )
    if alone:
        return [found]
    parts = zip(found.split(sizes, 1), parameters, strict=True)
    return [part.reshape(len(part), *p.shape) for part, p in parts]


def _between(ends: Sequence[Any], parameters: Sequence[Tensor]) -> list[Any]:
    """The nodes that a pass from some nodes to parameters runs, and others behind them where these are no leaves."""
    nodes, wanted = in_order(ends), set(map(id, parameters))
    if not all(parameter.is_leaf for parameter in parameters):
        return nodes
    leading: dict[Any, None] = {}
    for node in reversed(nodes):
        if id(leaf_of(node)) in wanted or any(child in leading for child, _ in node.next_functions):
            leading[node] = None
    return list(leading)


def _nonlinear(edges: Sequence[GradientEdge]) -> RefusedError:
    names = ", ".join(sorted({node_name(edge.node) for edge in edges}))
    return RefusedError(
        f"engm: between {names} and a parameter a hook or a torch.autograd.Function changes gradients by how large "
        "they are, so that the gradients of the examples do not add up to the gradient. Leave it out, or clip the "
        "parameter's .grad after the backward pass."
    )
