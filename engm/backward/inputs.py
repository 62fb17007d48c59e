"""Gradients of the losses with respect to the network's inputs, which N-ENGM and A-ENGM weigh examples by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed import on_any
from ..graph.input_rows import plan_of_inputs
from ..graph.plan import PlanCache
from ..graph.routing import signature_of, skeleton_of
from ..graph.trace import Trace
from ..terms import PerExampleGradient, accumulation_dtype
from ..terms.loss_scale import UNSCALED, LossScale
from ..terms.owners import Owners, Ownership

Inputs = Tensor | Sequence[Tensor] | None


def input_gradients(losses: Tensor, leaves: Sequence[Tensor], scale: LossScale = UNSCALED) -> tuple[Tensor | None, ...]:
    """Gradients of the summed, scaled losses with respect to ``leaves``; the graph is kept.

    The scale is still in them, since the norms of gradients in float16 are taken before it is divided out.
    """
    if not leaves:
        return ()
    return torch.autograd.grad(losses, list(leaves), scale.seeds(losses), retain_graph=True, allow_unused=True)


def input_rows(plans: PlanCache, losses: Tensor, leaves: Sequence[Tensor], traced: Trace) -> tuple[Ownership, ...]:
    """In which rows of each of ``leaves`` the examples lie: measured once a structure of the graph, and remembered.

    Args:
        plans: where the answer is remembered.
        losses: ``[n]``.
        leaves: tensors that require grad.
        traced: the graph behind ``losses``.

    Raises:
        ValueError: an input does not have its examples along the first dimension.
    """
    if not leaves:
        return ()
    n, asked = losses.shape[0], tuple(map(id, leaves))
    if asked in traced.rows_of_inputs:
        return traced.rows_of_inputs[asked]
    numbers = {key: number for number, key in enumerate(traced.leaves)}
    which = tuple(numbers.get(id(leaf), tuple(leaf.shape)) for leaf in leaves)
    signature = ("inputs", which, signature_of(traced, skeleton_of(traced, n), n))
    plan = plans.find(signature, traced)
    if on_any(traced.group, plan is None, losses.device) or plan is None:
        with traced.still_buffers():
            plan = plan_of_inputs(traced, losses, leaves)
        if plan.keeps:
            plans.keep(signature, plan)
    traced.rows_of_inputs[asked] = plan.layouts  # type: ignore[assignment]
    return traced.rows_of_inputs[asked]


def input_norms(gradients: Tensor | Sequence[Tensor], rows: Sequence[Ownership], n: int) -> Tensor:
    """``[n]``, norm of each example's input gradient; rows of an example and several inputs add up.

    Args:
        gradients: of the inputs.
        rows: where the examples lie in each of them.
        n: number of examples.
    """
    parts = [gradients] if isinstance(gradients, Tensor) else list(gradients)
    total: Tensor | float = 0.0
    for part, ownership in zip(parts, rows, strict=True):
        dims = ownership.dims if isinstance(ownership, Owners) else 1 + ownership.dim
        squares = part.detach().to(accumulation_dtype(part)).abs().square()
        squares = squares.unsqueeze(-1).flatten(dims).sum(-1).flatten()
        grouped = PerExampleGradient(squares).grouped(ownership.flattened(tuple(part.shape)))
        total = total + grouped.dense(slice(0, n))
        if isinstance(ownership, Owners) and ownership.lost:
            total = torch.full_like(total, torch.nan)
    return torch.as_tensor(total).sqrt()


def unscaled_inputs(
    inputs: Inputs,
    leaves: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    rows: Sequence[Ownership],
    n: int,
    scale: LossScale,
) -> tuple[Tensor | tuple[Tensor, ...] | None, Tensor | None]:
    """Gradients of scaled losses in the structure of ``inputs``, without the scale, and if there is one, their norms.

    Args:
        inputs: what they were asked for.
        leaves: that stand for ``inputs``.
        gradients: of the leaves.
        rows: where the examples lie in each of them.
        n: number of examples.
        scale: on the losses.
    """
    scaled = pack_input_grads(inputs, leaves, gradients)
    if scaled is None or scale.factor == 1.0:
        return scaled, None
    norms = scale.off_norms(input_norms(scaled, rows, n))
    parts = scale.off_gradients([scaled] if isinstance(scaled, Tensor) else scaled)
    return (parts[0] if isinstance(scaled, Tensor) else parts), norms  # type: ignore[return-value]


def resolve_inputs(traced: Trace | None, inputs: Inputs) -> tuple[Tensor, ...]:
    """The tensors whose gradients stand for ``inputs``: themselves, or the leaf the wrapper put in their place.

    Raises:
        TypeError: not a tensor or a sequence of tensors.
        ValueError: one of them neither requires grad nor is an input that the wrapper replaced.
    """
    if inputs is None:
        return ()
    given = tuple(inputs) if isinstance(inputs, Sequence) else (inputs,)
    seen = [] if traced is None else [pair for capture in traced.captures for pair in capture.inputs]
    found = []
    for tensor in given:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"inputs must be a tensor or a tuple of tensors, got {type(tensor).__name__}.")
        leaf = tensor if tensor.requires_grad else next((leaf for ref, leaf in seen if ref() is tensor), None)
        if leaf is None:
            raise ValueError(
                "the gradient with respect to inputs is needed, but they do not require grad. Call "
                "inputs.requires_grad_() before the forward pass (N-ENGM and A-ENGM also accept the very tensor that "
                "the wrapped model was called with)."
            )
        found.append(leaf)
    return tuple(found)


def pack_input_grads(
    inputs: Inputs, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Tensor | tuple[Tensor, ...] | None:
    """Gradients in the structure of ``inputs``; zero for one of several inputs that the losses do not depend on.

    Raises:
        ValueError: the losses depend on none of the inputs, or there are no inputs.
    """
    if inputs is None:
        return None
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            "the losses do not depend on inputs, so there is no gradient to read: pass the tensor that the model was "
            "called with (not a copy of it, nor one that was detached on the way)."
        )
    filled = tuple(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True))
    return filled[0] if isinstance(inputs, Tensor) else filled
