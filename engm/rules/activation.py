"""The rule of activations with a trained slope, whose gradient is computed as that of a normalisation's scale."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..terms import Term
from .base import INPUT, Rule, add_rule
from .normalization import affine_terms, by_channel


@add_rule(nn.PReLU)
class PReLURule(Rule):
    """One slope for all, ``[n, *]``, or one a channel, ``[n, C, *]``; its gradient is ``sum_t min(x_t, 0) gy_t``."""

    parameter_names = ("weight",)
    operators: ClassVar = {"PreluKernel": (INPUT, "weight")}
    on_parameters = frozenset(["View", "ReshapeAlias"])

    def terms(
        self,
        module: Any,
        activations: Tensor,
        backprops: Tensor,
        saved: Any,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        x, gy = activations.clamp(max=0), backprops
        if module.weight.numel() == 1:
            x, gy = (t.reshape(t.shape[0], 1, t.shape[1:].numel()) for t in (x, gy))
        # That sum is the scale gradient of a normalisation with mean 0 and deviation 1.
        return affine_terms(by_channel(x, gy, None, gy.new_ones(1, 1)), names)
