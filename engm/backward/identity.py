"""One identity watches: a sum of per-example gradients with random signs is a gradient that autograd computes too.

For random signs ``r`` the terms must satisfy ``sum_i r_i g_i = d/dtheta sum_i r_i L_i`` for every parameter, the right
side by plain autograd. A wrong owner of a row, a use of a parameter that was missed, a plan that does not hold, a wrong
rule, a broken kernel: each breaks it with probability one, for one backward pass, whatever the structure (Freivalds'
check of a matrix product is the same idea). Statistics of batch norms are constants on both sides.

Signs leave every gradient as large as it was, so that a hook which clips it by its norm over the batch does the same
on both sides. Where the plan is of an earlier graph some of the ``r`` are therefore zero; where it was measured on this
very graph, scaled losses have told already.

Where a gradient nearly cancels, as that of a layer's weight in front of a normalisation, rounding is all that two ways
to compute it have in common, and no share of a size says how much that is. So before anything is refused, both sides
are asked for the same gradients from seeds that are larger by a few units in the last place: what changes is rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._C import release_graph
from ..checks import RefusedError
from ..graph.plan import Collected, PlannedGraph
from ..terms.loss_scale import UNSCALED, LossScale
from ..torch_internals import (
    differences_of_each,
    has_gradient_hooks,
    is_compiled_region,
    norms_of_each,
    recomputed_once,
)
from .collect import TermCollector

# Of a gradient, as a share of the norms that add up to it, by the type of the parameter, or float32 where a part of the
# graph is in it, into which the parameter may be cast. In 16 bits autograd's own sums over many rows may be off by as
# much as all of it, so they are compared with nothing.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
NARROW_TOLERANCE = 5e-2  # where anything is computed in a narrower type
# As a share of the whole gradient: what is smaller changes a norm by less than the square of it. A scale in front of
# which equal numbers were normalised has rounding for its gradient, of hundreds of times these numbers' size.
ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-4}
NARROW_ROUNDING = 1e-2
# By how many units of the type seeds are larger where rounding is looked at: so few that a function which is not
# linear in its gradients does not pass for rounding; and how far beyond that of both sides a difference may be. What is
# not small beside the whole gradient is rounding only if the same seeds give the same: a function may draw numbers.
STRETCHES = (11, 21, 37)
TIMES_ROUNDING = 30


def check_identity(
    graph: PlannedGraph, losses: Tensor, seed: int, scale: LossScale = UNSCALED, use_up: bool = False
) -> None:
    """Compare sums of per-example gradients with autograd's; what was collected for it is noted in the graph.

    Args:
        graph: behind ``losses``.
        losses: ``[n]``.
        seed: of the signs.
        scale: on the losses inside the passes.
        use_up: keep the terms and let the graph go, for a step that needs no more of it.

    Raises:
        RuntimeError: names the parameters that disagree, and says what to do.
    """
    traced, n = graph.trace, graph.n
    named = [
        (name, p)
        for name, p in traced.trained
        if id(p) in traced.leaves and p.dtype in TOLERANCE and not has_gradient_hooks([p])
    ]
    if not named:
        return
    signs = 1.0 - 2.0 * torch.randint(2, (n,), generator=torch.Generator().manual_seed(seed), device="cpu")
    if not graph.fresh and n > 1:
        left_out = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu")[: max(1, n // 4)]
        signs[left_out] = 0
    signs = signs.to(losses)
    collector = TermCollector(graph, keep=True)
    collector.run(losses, scale.seeds(losses), retain_graph=True, as_they_are=True)
    squared = collector.squared_norms(losses)
    sizes = squared.sqrt().sum(1).double()
    with recomputed_once():
        sums = {id(p): total for p, total in collector.weighted_sums(signs, {id(p) for _, p in named}, again=use_up)}
    graph.collected = Collected(squared, collector.terms if use_up else None)

    def ours(of: set[int], stretch: float) -> dict[int, Tensor]:
        """The sums once more, from longer seeds, of some parameters (``id``)."""
        again = TermCollector(graph, keep=True)
        again.run(losses, scale.seeds(losses) * stretch, retain_graph=True, as_they_are=True)
        with recomputed_once():
            return {id(p): total for p, total in again.weighted_sums(signs, of)}

    try:
        wrong = _disagreeing(graph, losses, named, signs * scale.factor, sums, sizes, collector.rows, ours)
    finally:
        if use_up:
            release_graph(traced.order)
    if not wrong:
        return
    shown = ", ".join(f"'{name}'" for name in wrong[:5])
    if any(is_compiled_region(node) for node in traced.order):
        raise RefusedError(
            f"engm: inside a region made by torch.compile {shown} are used in more ways than by calls of their layers, "
            "so a part of their per-example gradients cannot be seen. Call the layer itself instead of computing with "
            "what is inside it, leave that part uncompiled with torch.compiler.disable, or freeze the parameter."
        )
    raise RefusedError(
        f"engm: the per-example gradients of {shown} do not add up to the gradient, so norms would be wrong. A rule "
        "given with engm.register_rule may not fit its layer, a torch.autograd.Function may not be linear in the "
        "gradients it is given, or a hook may change them; if it is none of these, please report it. Gradients and "
        "parameters are as they were. GradNormModule(net, strict=False) goes on without this check."
    )


def _disagreeing(
    graph: PlannedGraph,
    losses: Tensor,
    named: Sequence[tuple[str, Tensor]],
    seeds: Tensor,
    sums: dict[int, Tensor],
    sizes: Tensor,
    rows: dict[int, int],
    ours: Callable[[set[int], float], dict[int, Tensor]],
) -> list[str]:
    """Names of the parameters whose gradients autograd does not agree with.

    Args:
        graph: behind ``losses``; it is kept.
        losses: ``[n]``.
        named: the parameters to compare, with their names.
        seeds: ``[n]``, the signs, scaled as the losses are.
        sums: by parameter (``id``), the sums of its per-example gradients with the signs; they are used up.
        sizes: of every parameter, in the order of ``rows``, the sum of the norms of its per-example gradients.
        rows: by parameter (``id``), its place in ``sizes``.
        ours: gives the sums of some parameters (``id``) from seeds that are longer.
    """
    dtypes = graph.trace.dtypes

    def gradients(of: list[Tensor], seeds: Tensor) -> tuple[Tensor | None, ...]:
        with graph.frozen_statistics():
            return torch.autograd.grad(losses, of, seeds, retain_graph=True, allow_unused=True)

    wanted = gradients([parameter for _, parameter in named], seeds)
    reached = [(pair, gradient) for pair, gradient in zip(named, wanted, strict=True) if gradient is not None]
    if not reached:  # parameters that were cast since are others to autograd
        return []
    parameters = [parameter for (_, parameter), _ in reached]
    expected = [gradient.to_dense() for _, gradient in reached]
    found = [_dense_like(parameter, sums.pop(id(parameter), None)) for parameter in parameters]
    size = torch.maximum(
        sizes[[rows[id(parameter)] for parameter in parameters]], torch.stack(norms_of_each(expected, torch.float64))
    )
    distance = torch.stack(norms_of_each(differences_of_each(found, expected), torch.float64))
    whole = sizes.norm()
    allowed = [_allowed(parameter, dtypes) for parameter in parameters]
    share, rounding, smallest = torch.tensor(allowed).to(size).unbind(1)
    suspect = (distance > share * size + rounding * whole + smallest) & torch.isfinite(size)
    places = suspect.nonzero().flatten().tolist()
    if not places:
        return []

    def changes(stretch: float) -> Tensor:
        """By how much the suspects' gradients change with seeds that are longer, apart from being longer."""
        again = gradients([parameters[place] for place in places], seeds * stretch)
        pairs = [(expected[place], gradient) for place, gradient in zip(places, again, strict=True)]
        differences = [one if other is None else other.to_dense() / stretch - one for one, other in pairs]
        return torch.stack(norms_of_each(differences, torch.float64))

    def our_changes(stretch: float) -> Tensor:
        """The same of the sums of per-example gradients."""
        again = ours({id(parameters[place]) for place in places}, stretch)
        longer = [_dense_like(parameters[place], again.get(id(parameters[place]))) for place in places]
        differences = [other / stretch - found[place] for place, other in zip(places, longer, strict=True)]
        return torch.stack(norms_of_each(differences, torch.float64))

    stretches = [1 + units * graph.trace.unit for units in STRETCHES]
    own = torch.stack([each(stretch) for each in (changes, our_changes) for stretch in stretches]).amax(0)
    may_round = (own <= share[places] * whole) | (changes(1.0) == 0)
    agrees = may_round & (distance[places] <= TIMES_ROUNDING * own)
    return [reached[place][0][0] for place, is_right in zip(places, agrees.tolist(), strict=True) if not is_right]


def _dense_like(parameter: Tensor, total: Tensor | None) -> Tensor:
    """A gradient in the form and type of the parameter, zeros if there is none."""
    if total is None:
        return torch.zeros_like(parameter)
    return total.to_dense().reshape(parameter.shape).to(parameter.dtype)


def _allowed(parameter: Tensor, dtypes: set[torch.dtype]) -> tuple[float, float, float]:
    """How far gradients may differ: as a share of their own size, as one of the whole gradient's, and in any case.

    Args:
        parameter: whose gradients they are.
        dtypes: of the numbers in the graph.
    """
    narrow = bool(dtypes & {torch.float16, torch.bfloat16})
    sums_of = torch.float32 if dtypes & {torch.float32, torch.complex64} else parameter.dtype
    share = NARROW_TOLERANCE if narrow else TOLERANCE[sums_of]
    rounding = NARROW_ROUNDING if narrow else ROUNDING[sums_of]
    # Autograd's products may be too small for float16.
    smallest = torch.finfo(torch.float16).smallest_normal if torch.float16 in dtypes else 0.0
    return share, rounding, smallest * parameter.numel() ** 0.5
