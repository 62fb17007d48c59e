"""Rules of operators: what a parameter that no layer call accounts for contributes, read from one autograd node.

A class token that is expanded, a position table that is added, a layer scale, the packed projection of
``nn.MultiheadAttention``, ``F.linear(x, layer.weight)``, the weight that ``weight_norm`` computes: each enters the
batch's computation at one node of the autograd graph. The gradient of the node's output, cut by examples, and what the
node saved for its own backward pass give the per-example gradients of what entered.

For a node without a rule here :func:`masked_gradients` runs the node's own backward once an example. That is exact for
any operator, built in or not, as long as every example's gradient lies in its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..layout import Layout
from ..terms import (
    CHUNK_BYTES,
    ConvFactors,
    ConvGeometry,
    EmbeddingFactors,
    LinearFactors,
    PerExampleGradient,
    Term,
    accumulation_dtype,
)
from .conv import transposed_factors
from .normalization import (
    BATCH_NORM_NODES,
    SYNC_BATCH_NORM_NODE,
    affine_terms,
    batch_norm_statistics,
    by_channel,
)


@dataclass(frozen=True)
class Entry:
    """One tensor without a batch that enters the batch's computation at one autograd node.

    Attributes:
        node: the node.
        slot: which of its inputs the tensor is.
        shape: of the tensor.
        layout: of the node's (first) output.
        n: number of examples.
        transposed: the tensor is the transpose of the node's input (for matrix products).
    """

    node: Any
    slot: int
    shape: tuple[int, ...]
    layout: Layout
    n: int
    transposed: bool = False

    @property
    def child(self) -> tuple[Any, int]:
        """The edge to the tensor that enters, past the transposition."""
        edge = self.node.next_functions[self.slot]
        return edge[0].next_functions[0] if self.transposed else edge

    def saved(self, name: str) -> Any:
        """What the node saved under ``name`` (tensors detached), or None."""
        value = getattr(self.node, f"_saved_{name}", None)
        return value.detach() if isinstance(value, Tensor) else value


OperatorRule = Callable[[Entry, Tensor], Term | None]
_RULES: dict[str, OperatorRule] = {}


def operator_name(node: Any) -> str:
    """``"Addmm"`` for ``AddmmBackward0``."""
    return str(node.name()).rstrip("0123456789").removesuffix("Backward").rpartition("::")[2]


def _operator(*names: str) -> Callable[[OperatorRule], OperatorRule]:
    def register(rule: OperatorRule) -> OperatorRule:
        for name in names:
            _RULES[name] = rule
        return rule

    return register


def entry_term(entry: Entry, backprops: Sequence[Tensor | None]) -> Term | None:
    """Per-example gradients of the tensor that enters; None if there is no rule (see :func:`masked_gradients`).

    Args:
        entry: where it enters.
        backprops: gradients of the summed losses with respect to the node's outputs.
    """
    rule = _RULES.get(operator_name(entry.node))
    first = backprops[0]
    if rule is None or first is None or first.is_complex():
        return None
    return rule(entry, first.detach())


def has_rule(entry: Entry) -> bool:
    """Whether :func:`entry_term` has an answer, tried on a gradient of zeros."""
    output = entry.node._input_metadata[0]
    zeros = torch.zeros((), dtype=output.dtype, device=output.device).expand(tuple(output.shape))
    return entry_term(entry, [zeros]) is not None


def enters_by_broadcast(entry: Entry) -> bool:
    """Whether every example sees the same values: a weight, or a tensor that is repeated over the batch."""
    by_position = {"Bmm": (1,), "Embedding": (0,), "NativeLayerNorm": (1, 2), "FusedRmsNorm": (1, 2)}
    by_row = {"Mm": (1,), "Addmm": (0, 2), "Convolution": (1, 2)}
    by_row |= dict.fromkeys(("NativeGroupNorm", *BATCH_NORMS), (1, 2))
    name = operator_name(entry.node)
    if name in by_position:
        return entry.slot in by_position[name]
    if name in by_row:
        return entry.slot in by_row[name] and entry.layout.dim == 0  # the second dimension is the weight's own
    rank = len(entry.node._input_metadata[0].shape)
    if len(entry.shape) > rank:
        return False
    rows = _aligned(entry)[entry.layout.dim]
    return rows == 1 or (name == "Repeat" and entry.layout.inner % rows == 0)  # whole copies for each example


def _aligned(entry: Entry) -> tuple[int, ...]:
    """The entering tensor's shape as broadcasting sees it: with leading ones to the rank of the node's output."""
    rank = len(entry.node._input_metadata[0].shape)
    return (1,) * (rank - len(entry.shape)) + entry.shape


# -- any operator --------------------------------------------------------------------------------------------------


def masked_gradients(entry: Entry, backprops: Sequence[Tensor | None]) -> PerExampleGradient:
    """The node's own backward pass with the rows of one example at a time, in batched chunks where that works.

    Not to be called while a backward pass runs, which decides for its nodes what they compute.
    """
    rows = [None if g is None else entry.layout.examples_first(g.detach(), entry.n) for g in backprops]
    each = max(1, sum(r.numel() * r.element_size() for r in rows if r is not None))
    chunk = max(1, min(entry.n, CHUNK_BYTES // each))

    shape = tuple(reversed(entry.shape)) if entry.transposed else entry.shape

    def of(gradients: Sequence[Tensor | None]) -> Tensor | None:
        found = _input_gradient(entry.node, entry.slot, gradients)
        return None if found is None else found.sum_to_size(shape)  # the engine would see to that

    found: list[Tensor] = []
    for start in range(0, entry.n, chunk):
        picked = range(start, min(start + chunk, entry.n))
        masked = [None if r is None else torch.stack([_only(r, i, entry.layout) for i in picked]) for r in rows]
        found.append(_each(of, masked, shape))
    gradient = torch.cat(found)
    return PerExampleGradient(gradient.mT if entry.transposed else gradient)


def _only(rows: Tensor, example: int, layout: Layout) -> Tensor:
    """The gradient that has the rows of one example alone."""
    kept = torch.zeros_like(rows)
    kept[example] = rows[example]
    return layout.from_examples(kept)


def _input_gradient(node: Any, slot: int, gradients: Sequence[Tensor | None]) -> Tensor | None:
    """What a node passes on to one of its inputs; none of the hooks on it run."""
    with torch.no_grad():
        python = hasattr(node, "saved_tensors")
        passed = node.apply(*gradients) if python else node(*gradients)
    passed = passed if isinstance(passed, tuple) else (passed,)
    if not python:
        return passed[slot]
    # A function in Python returns a gradient for every argument, and has edges for its tensors alone.
    wanted = [g for g, needed in zip(passed, node.needs_input_grad, strict=True) if needed]
    edges = [number for number, (child, _) in enumerate(node.next_functions) if child is not None]
    return wanted[edges.index(slot)]


def _each(
    backward: Callable[[Sequence[Tensor | None]], Tensor | None],
    gradients: Sequence[Tensor | None],
    shape: tuple[int, ...],
) -> Tensor:
    """``backward`` of every entry of a batch of output gradients, ``[batch, *shape]``; a loop where vmap cannot.

    What vmap gives is believed if it adds up to ``backward`` of the sum: torch 2.14 has operators for which it does not
    (the batched backward of ``cdist`` repeats the first entry).
    """
    given = [g for g in gradients if g is not None]

    def one(*parts: Tensor) -> Tensor:
        rest = iter(parts)
        found = backward([None if g is None else next(rest) for g in gradients])
        return parts[0].new_zeros(shape) if found is None else found

    if given[0].shape[0] > 1:
        try:
            batched = torch.func.vmap(one)(*given)
        except (RuntimeError, ValueError):
            pass  # no batching rule for something on the way: one by one, which will tell if that is not the reason
        else:
            if adds_up(batched, one(*(g.sum(0) for g in given))):
                return batched
    return torch.stack([one(*(g[i] for g in given)).detach() for i in range(given[0].shape[0])])


def adds_up(batched: Tensor, whole: Tensor) -> bool:
    """Whether gradients ``[batch, *shape]`` sum to that of the sum, as far as rounding lets one tell."""
    precision = torch.finfo(whole.dtype).eps ** 0.5
    scale = batched.unsqueeze(-1).flatten(1).norm(dim=1).sum()
    return bool((batched.sum(0) - whole).norm() <= precision * scale) or not bool(torch.isfinite(scale))


def pull_back(edge: GradientEdge, parameter: Tensor, gradients: Tensor) -> Tensor:
    """Gradients ``[k, *parameter.shape]`` of a parameter from those of a tensor computed from it, ``[k, *shape]``."""

    def of(parts: Sequence[Tensor | None]) -> Tensor | None:
        (found,) = torch.autograd.grad([edge], [parameter], parts, retain_graph=True, allow_unused=True)
        return found

    return _each(of, [gradients], tuple(parameter.shape))


# -- sums and products with broadcasting --------------------------------------------------------------------------


def _repeated(entry: Entry, contribution: Tensor) -> Term | None:
    """Sum ``contribution``, of the output's shape, over everything along which the entering tensor was repeated.

    None if the tensor is not repeated along the batch: then each example has rows of its own in it.
    """
    aligned = _aligned(entry)
    if aligned[entry.layout.dim] != 1:
        return None
    kept = [size for dim, size in enumerate(aligned) if dim != entry.layout.dim]
    rows = entry.layout.examples_first(contribution, entry.n)
    shape, reduced = [entry.n, rows.shape[1]], [1]
    for size, length in zip(kept, rows.shape[2:], strict=True):
        if size == 0 or length % size:
            return None
        reduced.append(len(shape))
        shape += [length // size, size]
    rows = rows.reshape(shape)
    total = rows.sum(reduced, dtype=accumulation_dtype(rows))
    return PerExampleGradient(total.reshape(entry.n, *entry.shape))


@_operator("Expand", "Repeat")
def _expand(entry: Entry, gy: Tensor) -> Term | None:
    return _repeated(entry, gy)


@_operator("Add", "Sub")
def _add(entry: Entry, gy: Tensor) -> Term | None:
    sign = -1 if operator_name(entry.node) == "Sub" else 1
    factor = sign * entry.saved("alpha") if entry.slot == 1 else 1
    return _repeated(entry, gy if factor == 1 else gy * factor)


@_operator("Mul")
def _mul(entry: Entry, gy: Tensor) -> Term | None:
    other = entry.saved("self" if entry.slot == 1 else "other")
    return _repeated(entry, gy * other) if isinstance(other, Tensor) else None


@_operator("Div")
def _div(entry: Entry, gy: Tensor) -> Term | None:
    other = entry.saved("other")
    return _repeated(entry, gy / other) if entry.slot == 0 and isinstance(other, Tensor) else None


# -- matrix products -----------------------------------------------------------------------------------------------


def _product(entry: Entry, left: Tensor | None, gy: Tensor) -> Term | None:
    """``left [R, p] @ entering [p, d]``, given ``gy [R, d]``."""
    if left is None or entry.layout.dim != 0:
        return None
    a, b = (entry.layout.examples_first(t, entry.n) for t in (left.to(gy.dtype), gy))
    return LinearFactors(a, b) if entry.transposed else LinearFactors(b, a)


@_operator("Mm")
def _mm(entry: Entry, gy: Tensor) -> Term | None:
    return _product(entry, entry.saved("self"), gy) if entry.slot == 1 else None


@_operator("Addmm")
def _addmm(entry: Entry, gy: Tensor) -> Term | None:
    if entry.slot == 0:
        beta = entry.saved("beta")
        return _repeated(entry, gy if beta == 1 else gy * beta)
    alpha = entry.saved("alpha")
    return _product(entry, entry.saved("mat1"), gy if alpha == 1 else gy * alpha) if entry.slot == 2 else None


@_operator("Bmm")
def _bmm(entry: Entry, gy: Tensor) -> Term | None:
    left = entry.saved("self")
    if entry.slot != 1 or left is None or gy.shape[0] != 1 or entry.layout.dim != 1:
        return None
    a, b = (entry.layout.examples_first(t, entry.n).flatten(2) for t in (left.to(gy.dtype), gy))
    return PerExampleGradient(LinearFactors(b, a).dense(slice(0, entry.n)).unsqueeze(1))


# -- layers called as functions -------------------------------------------------------------------------------------


@_operator("Convolution")
def _convolution(entry: Entry, gy: Tensor) -> Term | None:
    if entry.layout.dim != 0 or entry.slot not in (1, 2):
        return None
    layout, n = entry.layout, entry.n
    if entry.slot == 2:
        rows = gy.flatten(2).sum(2, dtype=accumulation_dtype(gy))
        return PerExampleGradient(layout.examples_first(rows, n).sum(1))
    inputs = entry.saved("input")
    if inputs is None:
        return None
    geometry = ConvGeometry(
        tuple(entry.shape[2:]),
        tuple(entry.saved("stride")),
        tuple(entry.saved("padding")),
        tuple(entry.saved("dilation")),
        int(entry.saved("groups")),
    )
    inputs = inputs.to(gy.dtype)
    factors = ConvFactors(inputs, gy, geometry)
    if entry.saved("transposed"):
        factors = transposed_factors(inputs, gy, geometry)
    return factors.fold(layout.outer, n, layout.inner)


@_operator("Embedding")
def _embedding(entry: Entry, gy: Tensor) -> Term | None:
    indices = entry.saved("indices")
    if indices is None or entry.saved("scale_grad_by_freq"):
        return None
    a = entry.layout.examples_first(indices, entry.n).flatten(1)
    b = entry.layout.examples_first(gy, entry.n).reshape(*a.shape, gy.shape[-1])
    return EmbeddingFactors(a, b, entry.shape[0], int(entry.saved("padding_idx")), bool(entry.saved("sparse")))


BATCH_NORMS = tuple(name.removesuffix("Backward") for name in (*BATCH_NORM_NODES, SYNC_BATCH_NORM_NODE))


def _affine(entry: Entry, views: tuple[Tensor, Tensor, Tensor | None, Tensor, int]) -> Term:
    """The scale (slot 1) or shift (slot 2) of a normalisation; ``views`` has a row for every row of the batch."""
    name = "weight" if entry.slot == 1 else "bias"
    rows = affine_terms(views, (name,))[name].gradient  # type: ignore[attr-defined]
    gradient = entry.layout.examples_first(rows, entry.n).sum(1)
    return PerExampleGradient(gradient.reshape(entry.n, *entry.shape))


@_operator("NativeLayerNorm")
def _layer_norm(entry: Entry, gy: Tensor) -> Term | None:
    x, mean, rstd = (entry.saved(name) for name in ("input", "result1", "result2"))
    if x is None or mean is None or rstd is None or entry.slot not in (1, 2):
        return None
    layout = entry.layout.flattened(tuple(gy.shape))
    rows, size = layout.outer * entry.n * layout.inner, prod(entry.shape)
    x, gy = (t.reshape(rows, -1, size) for t in (x, gy))
    flat = Entry(entry.node, entry.slot, entry.shape, layout, entry.n)
    return _affine(flat, (x, gy, mean.reshape(rows, -1, 1), rstd.reshape(rows, -1, 1), 2))


@_operator("NativeGroupNorm")
def _group_norm(entry: Entry, gy: Tensor) -> Term | None:
    x, mean, rstd = (entry.saved(name) for name in ("input", "result1", "result2"))
    if x is None or mean is None or rstd is None or entry.slot not in (1, 2) or entry.layout.dim != 0:
        return None
    per_group = gy.shape[1] // int(entry.saved("group"))
    mean, rstd = (t.reshape(gy.shape[0], -1).repeat_interleave(per_group, 1) for t in (mean, rstd))
    return _affine(entry, by_channel(x, gy, mean, rstd))


def batch_norm_gain(node: Any) -> Tensor:
    """``scale / sigma`` of a batch norm that takes its statistics from the batch, ``[C]``."""
    statistics = batch_norm_statistics(node)
    if statistics is None:
        raise RuntimeError(f"engm: {node.name()} has let go of its statistics, so they cannot be taken for constants.")
    _, rstd, _ = statistics
    weight = node.saved_tensors[1] if hasattr(node, "saved_tensors") else getattr(node, "_saved_weight", None)
    return rstd if weight is None else rstd * weight.detach()


@_operator(*BATCH_NORMS)
def _batch_norm(entry: Entry, gy: Tensor) -> Term | None:
    python = hasattr(entry.node, "saved_tensors")
    x = entry.node.saved_tensors[0].detach() if python else entry.saved("input")
    statistics = batch_norm_statistics(entry.node)
    if x is None or statistics is None or entry.slot not in (1, 2) or entry.layout.dim != 0:
        return None
    mean, rstd, _ = statistics
    return _affine(entry, by_channel(x, gy, mean.unsqueeze(0), rstd.unsqueeze(0)))
