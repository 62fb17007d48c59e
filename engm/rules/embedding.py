"""The rules of embeddings: a row of the table gets the backprops of the positions that looked the row up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..terms import EmbeddingFactors, Term
from ..terms.owners import Owners
from ..torch_internals import saved_option
from .base import Rule, add_rule

# How many times as many positions there may be if bags lie side by side, all as long as the longest.
UNEVEN = 4

Inputs = tuple[Tensor, Tensor | None, Tensor | None]
"""The arguments of ``nn.EmbeddingBag``: ``input``, ``offsets`` and ``per_sample_weights``."""


def inverse_counts(indices: Tensor, num_embeddings: int) -> Tensor:
    """For every index one over how often it occurs among all, which ``scale_grad_by_freq`` multiplies gradients by.

    Args:
        indices: of any shape.
        num_embeddings: rows of the table.

    Returns:
        Factors in the shape of ``indices``, float64.
    """
    flat = indices.detach().flatten().long()
    counts = torch.zeros(num_embeddings, dtype=torch.long, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    return (1 / counts.to(torch.float64))[flat].view(indices.shape)


def _padding_of(module: Any) -> int:
    """The row of the table that gets no gradient, which torch counts from the end if it is negative; -1: none."""
    index = module.padding_idx
    return -1 if index is None else index % module.weight.shape[0]


class _TableRule(Rule):
    """What the rules of embeddings share."""

    parameter_names = ("weight",)
    options: tuple[str, ...] = ("padding_idx", "sparse", "scale_grad_by_freq")

    def describes(self, module: Any, node: Any, activations: Any, shape: tuple[int, ...]) -> bool:
        wanted = {"padding_idx": _padding_of(module), "sparse": module.sparse}
        wanted["scale_grad_by_freq"] = module.scale_grad_by_freq
        return all(saved_option(node, name) == value for name, value in wanted.items())


@add_rule(nn.Embedding)
class EmbeddingRule(_TableRule):
    """``[n, *] -> [n, *, d]``, with every option of the module.

    With ``scale_grad_by_freq`` gradients are divided by counts over the whole batch of the call, as autograd does.
    ``max_norm`` changes the table before it is read, and leaves gradients as they are.
    """

    positionwise = True
    operators: ClassVar = {"Embedding": ("weight",)}

    def describes(self, module: Any, node: Any, activations: Any, shape: tuple[int, ...]) -> bool:
        same = activations is None or tuple(activations.shape) == shape[:-1]
        return same and super().describes(module, node, activations, shape)

    def save(self, module: Any, activations: Tensor, output: Tensor) -> Tensor | None:
        return inverse_counts(activations, module.weight.shape[0]) if module.scale_grad_by_freq else None

    def terms(
        self,
        module: Any,
        activations: Tensor,
        backprops: Tensor,
        saved: Any,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        indices, gy = activations.unsqueeze(1).flatten(1), backprops.unsqueeze(1).flatten(1, -2)
        if saved is not None:
            gy = gy * saved.view(-1, indices.shape[1]).unsqueeze(2).to(gy.dtype)
        factors = EmbeddingFactors(indices, gy, module.weight.shape[0], _padding_of(module), module.sparse)
        return {"weight": factors}


@add_rule(nn.EmbeddingBag)
class EmbeddingBagRule(_TableRule):
    """``[n, T]``, or ``[all positions]`` with offsets, ``-> [n, d]``: an example is a bag, in every mode.

    ``per_sample_weights`` belong to the data, also where they require a gradient.
    """

    options = (*_TableRule.options, "mode", "include_last_offset")
    operators: ClassVar = {"EmbeddingBag": ("weight",)}

    def describes(self, module: Any, node: Any, activations: Any, shape: tuple[int, ...]) -> bool:
        same = saved_option(node, "mode") == ("sum", "mean", "max").index(module.mode)
        return same and super().describes(module, node, activations, shape)

    def activations(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        names = ("input", "offsets", "per_sample_weights")
        return tuple(args[k] if k < len(args) else kwargs.get(name) for k, name in enumerate(names))

    def save(self, module: Any, activations: Any, output: Tensor) -> tuple[Tensor | None, Tensor | None]:
        counts = inverse_counts(activations[0], module.weight.shape[0]) if module.scale_grad_by_freq else None
        return counts, largest(module, activations) if module.mode == "max" else None

    def terms(
        self,
        module: Any,
        activations: Any,
        backprops: Tensor,
        saved: Any,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        counts, winners = saved
        source, offsets, weights = activations
        size, dtype = module.weight.shape[0], backprops.dtype
        if winners is None and offsets is not None and _is_uneven(module, source, offsets):
            return {"weight": self._of_positions(module, source, offsets, (counts, weights), backprops)}
        inside, indices = bags(module, source, offsets)
        if winners is not None:  # a feature's gradient goes to the position that has its maximum
            empty = ~inside.any(1, keepdim=True)
            gy = backprops.new_zeros(backprops.shape[0], indices.shape[1], backprops.shape[1])
            gy.scatter_(1, winners.unsqueeze(1), backprops.masked_fill(empty, 0).unsqueeze(1))
            return {"weight": EmbeddingFactors(indices, gy, size)}
        share = inside.to(torch.promote_types(dtype, torch.float32))
        if module.mode == "mean":
            share = share / share.sum(1, keepdim=True).clamp_min(1)
        for factor in (counts, weights):
            if factor is not None:
                share = share * laid_out(module, factor.detach(), offsets).to(share.dtype)
        gy = (backprops.unsqueeze(1) * share.unsqueeze(2)).to(dtype)
        if offsets is not None or module.padding_idx is not None:
            gy = gy.masked_fill(~inside.unsqueeze(2), 0)  # also where the gradient of an empty bag is not finite
        return {"weight": EmbeddingFactors(indices, gy, size, sparse=module.sparse)}

    def _of_positions(
        self,
        module: Any,
        source: Tensor,
        offsets: Tensor,
        factors: Sequence[Tensor | None],
        backprops: Tensor,
    ) -> Term:
        """The term of bags of very different lengths, whose rows are the positions."""
        _, lengths = _extents(module, source, offsets)
        bag_of = torch.arange(len(lengths), device=source.device).repeat_interleave(lengths)
        indices = source[: len(bag_of)]  # the first bag begins at 0
        inside = torch.ones_like(indices, dtype=torch.bool)
        if module.padding_idx is not None:
            inside = indices != _padding_of(module)
        share = inside.to(torch.promote_types(backprops.dtype, torch.float32))
        if module.mode == "mean":
            read = share.new_zeros(len(lengths)).index_add_(0, bag_of, share)
            share = share / read.clamp_min(1)[bag_of]
        for factor in factors:
            if factor is not None:
                share = share * factor.detach()[: len(bag_of)].to(share.dtype)
        gy = (backprops[bag_of] * share.unsqueeze(1)).to(backprops.dtype).masked_fill(~inside.unsqueeze(1), 0)
        rows = EmbeddingFactors(
            indices.unsqueeze(1), gy.unsqueeze(1), module.weight.shape[0], _padding_of(module), module.sparse
        )
        return rows.grouped(Owners(bag_of, len(lengths)))


def _is_uneven(module: Any, source: Tensor, offsets: Tensor) -> bool:
    """Whether bags side by side, all as long as the longest, would be several times as many positions as there are."""
    _, lengths = _extents(module, source, offsets)
    return lengths.numel() * int(lengths.max()) > UNEVEN * source.shape[0] > 0


def laid_out(module: Any, values: Tensor, offsets: Tensor | None) -> Tensor:
    """Values of all positions with one row for every bag, ``[n, T]``.

    ``T`` is the length of the longest bag, at least 1. Behind the end of a shorter bag the values are arbitrary ones.
    """
    return values if offsets is None else _padded(values, *_extents(module, values, offsets))


def bags(module: Any, source: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which positions ``[n, T]`` lie inside their bags and are no padding, and the indices ``[n, T]`` at these.

    At other positions the indices are arbitrary rows of the table.
    """
    indices = laid_out(module, source, offsets)
    inside = torch.ones_like(indices, dtype=torch.bool)
    if offsets is not None:
        _, lengths = _extents(module, source, offsets)
        inside = torch.arange(indices.shape[1], device=indices.device) < lengths.unsqueeze(1)
    if module.padding_idx is not None:
        inside = inside & (indices != _padding_of(module))
    return inside, indices


def _extents(module: Any, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Start and length of every bag, ``[n]``."""
    ends = offsets[1:]
    if not module.include_last_offset:
        ends = torch.cat([ends, ends.new_full((1,), values.shape[0])])
    starts = offsets[: ends.shape[0]]
    return starts, ends - starts


def _padded(values: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    longest = max(1, int(lengths.max()))
    if values.shape[0] == 0:
        return values.new_zeros(starts.shape[0], longest)
    positions = starts.unsqueeze(1) + torch.arange(longest, device=starts.device)
    return values[positions.clamp(max=values.shape[0] - 1)]


def largest(module: Any, inputs: Inputs) -> Tensor:
    """The position in its bag at which every feature has its maximum, ``[n, d]``, for bags in ``"max"`` mode.

    Of equal values the first counts, as in the layer itself.
    """
    inside, indices = bags(module, inputs[0], inputs[1])
    read = module.weight.detach()[indices.long()]
    return read.masked_fill(~inside.unsqueeze(2), -torch.inf).argmax(1)
