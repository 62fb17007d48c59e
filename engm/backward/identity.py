"""One identity watches: a sum of per-example gradients with random signs is a gradient that autograd computes too.

For random signs ``r`` the terms must satisfy ``sum_i r_i g_i = d/dtheta sum_i r_i L_i`` for every parameter, the right
side by plain autograd. A wrong owner of a row, a use of a parameter that was missed, a plan that does not hold, a wrong
rule, a broken kernel: each breaks it with probability one, for one backward pass, whatever the structure (Freivalds'
check of a matrix product is the same idea). Statistics of batch norms are constants on both sides.

Signs leave every gradient as large as it was, so that a hook which clips it by its norm over the batch does the same
on both sides. Where the plan is of an earlier graph some of the ``r`` are therefore zero; where it was measured on this
very graph, scaled losses have told already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import RefusedError
from ..graph.plan import Collected, PlannedGraph
from ..terms.loss_scale import UNSCALED, LossScale
from ..torch_internals import differences_of_each, has_gradient_hooks, is_compiled_region, norms_of_each
from .collect import TermCollector

# Of a gradient, as a share of the norms that add up to it, by the type of the parameter, or float32 where a part of the
# graph is in it, into which the parameter may be cast. In 16 bits autograd's own sums over many rows may be off by as
# much as all of it, so they are compared with nothing.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
NARROW_TOLERANCE = 5e-2  # where anything is computed in a narrower type
# Where parts cancel, as those of a bias in front of a mean that is subtracted, rounding is all that is left: as a share
# of the whole gradient. What is smaller than that hardly counts in a norm.
ROUNDING = 100  # in units of the same type
NARROW_ROUNDING = 1e-2


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
        if id(p) in traced.leaves and p.dtype in TOLERANCE and not has_gradient_hooks(p)
    ]
    if not named:
        return
    signs = 1.0 - 2.0 * torch.randint(2, (n,), generator=torch.Generator().manual_seed(seed), device="cpu")
    if not graph.fresh and n > 1:
        left_out = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu")[: max(1, n // 4)]
        signs[left_out] = 0
    signs = signs.to(losses)
    collector = TermCollector(graph, keep=True)
    collector.run(losses, scale.seeds(losses), retain_graph=True)
    squared = collector.squared_norms(losses)
    sizes = squared.sqrt().sum(1).double()
    whole = sizes.norm()
    sums = {id(p): total for p, total in collector.weighted_sums(signs, {id(p) for _, p in named}, again=use_up)}
    graph.collected = Collected(squared, collector.terms if use_up else None)
    with graph.frozen_statistics():
        wanted = torch.autograd.grad(
            losses, [p for _, p in named], signs * scale.factor, retain_graph=not use_up, allow_unused=True
        )
    reached = [(pair, gradient) for pair, gradient in zip(named, wanted, strict=True) if gradient is not None]
    if not reached:  # parameters that were cast since are others to autograd
        return
    parameters = [parameter for (_, parameter), _ in reached]
    expected = [gradient.to_dense() for _, gradient in reached]
    found = [_dense_like(parameter, sums.pop(id(parameter), None)) for parameter in parameters]
    size = torch.maximum(
        sizes[[collector.rows[id(parameter)] for parameter in parameters]],
        torch.stack(norms_of_each(expected, torch.float64)),
    )
    distance = torch.stack(norms_of_each(differences_of_each(found, expected), torch.float64))
    share, rounding, smallest = torch.tensor([_allowed(p, traced.dtypes) for p in parameters]).to(size).unbind(1)
    differs = (distance > share * size + rounding * whole + smallest) & torch.isfinite(size)
    wrong = [name for ((name, _), _), bad in zip(reached, differs.tolist(), strict=True) if bad]
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
    rounding = NARROW_ROUNDING if narrow else ROUNDING * torch.finfo(sums_of).eps
    # Autograd's products may be too small for float16.
    smallest = torch.finfo(torch.float16).smallest_normal if torch.float16 in dtypes else 0.0
    return share, rounding, smallest * parameter.numel() ** 0.5
