"""The pull-back through weight norm, for many gradients at once: torch has no batching rule for its backward pass.

With ``w = g v / ||v||``, norms taken over all dimensions but one, a gradient ``G`` of ``w`` gives ``<G, v> / ||v||`` to
``g`` and ``g / ||v|| (G - v <G, v> / ||v||^2)`` to ``v``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..torch_internals import leaf_of, operator_name, saved_by, saved_option


def through_weight_norm(node: Any, parameter: Tensor, gradients: Tensor) -> Tensor | None:
    """Gradients of a parameter, from gradients of the weight that weight norm computed from it.

    Args:
        node: the node that made the weight.
        parameter: the weight's direction ``v`` or length ``g``.
        gradients: of the weight, ``[k, *shape]``.

    Returns:
        ``[k, *parameter.shape]``; None where the node is no weight norm of the parameter itself, used once.
    """
    if operator_name(node) != "WeightNormInterface":
        return None
    own = [child is not None and leaf_of(child) is parameter for child, _ in node.next_functions]
    if own.count(True) != 1:
        return None
    v, g, norm = (saved_by(node, name).to(gradients.dtype) for name in ("v", "g", "result1"))
    others = [1 + dim for dim in range(v.dim()) if dim != saved_option(node, "dim") % v.dim()]
    along = (gradients * v).sum(others, keepdim=True) / norm
    if own[1]:
        return along.reshape(len(gradients), *g.shape)
    return (gradients - v / norm * along) * (g / norm)
