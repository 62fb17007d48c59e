"""Per-example gradients for an operator without a rule, from its own backward pass.

An operator's backward pass is linear in the gradients of its outputs. So with the rows of one example kept and all
others set to zero it gives that example's gradient, for any operator whose output's elements each belong to one. Where
an operator treats every element apart one run is enough: what broadcasting repeated is added up by autograd, after the
operator's backward pass, and before that every element of the output has a contribution of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..terms import CHUNK_BYTES, PerExampleGradient, Term, accumulation_dtype
from ..torch_internals import adds_up, is_multiplied, node_outputs, operator_name, passed_to_input, rows_of_nested
from .entries import Entry, names_of, owners_of
from .operators import repeated_term

# Operators that treat every element apart and take several tensors, which are broadcast.
BROADCASTING = names_of(
    """
    Addcdiv Addcmul Atan2 BinaryCrossEntropy BinaryCrossEntropyWithLogits Clamp ClampMax ClampMin Complex Copysign Div
    Fmax Fmin Fmod HuberLoss Hypot Lerp Logaddexp Logaddexp2 Maximum Minimum MseLoss Polar Pow PreluKernel Remainder
    SmoothL1Loss SpecialXlog1Py Xlogy
    """
)


def term_of_any(entry: Entry, backprops: Sequence[Tensor | None]) -> Term:
    """The term of what enters at a node without a rule, see :func:`masked_gradients`, which is asked where need be."""
    return by_element(entry, backprops) or masked_gradients(entry, backprops)


def runs_once(entry: Entry) -> bool:
    """Whether :func:`by_element` has an answer, tried on a gradient of zeros."""
    output = node_outputs(entry.node)[0]
    if output.is_nested_tensor:
        return False
    return by_element(entry, [torch.zeros(tuple(output.shape), dtype=output.dtype, device=output.device)]) is not None


def by_element(entry: Entry, backprops: Sequence[Tensor | None]) -> Term | None:
    """The term of what enters at a node that treats every element apart, from its backward pass on all examples.

    None where the node does not, or hands on something else than a contribution of every element of its output: the
    backward pass of a mean, say, or of an operator that adds up what it repeated by itself.

    Args:
        entry: where the tensor enters.
        backprops: as those of :func:`masked_gradients`.
    """
    gradient = backprops[0]
    if operator_name(entry.node) not in BROADCASTING or gradient is None or gradient.is_nested:
        return None
    found = passed_to_input(entry.node, entry.slot, [gradient.detach()])
    if found is None or found.layout != torch.strided or found.shape != gradient.shape:
        return None
    return repeated_term(entry, found)


def masked_gradients(entry: Entry, backprops: Sequence[Tensor | None]) -> PerExampleGradient:
    """Per-example gradients of what enters at a node, from the node's own backward pass on one example at a time.

    Several examples are computed at once where vmap can do that. This must not be called while a backward pass runs,
    because that pass decides for its nodes which gradients they compute.

    Args:
        entry: where the tensor enters.
        backprops: gradients of the summed losses with respect to the node's outputs; None where there is none.

    Returns:
        The gradients ``[n, *entry.shape]``.
    """
    arrived = [_Arrived.at(entry, number, g) for number, g in enumerate(backprops)]
    shape = tuple(reversed(entry.shape)) if entry.transposed else entry.shape
    if any(a is not None and a.gradient.is_nested for a in arrived):
        gradient = torch.stack([_of_nested(entry, arrived, shape, example) for example in range(entry.n)])
        return PerExampleGradient(gradient.mT if entry.transposed else gradient)
    each = sum(a.gradient.nbytes for a in arrived if a is not None)
    if each == 0:
        like = next(g for g in backprops if g is not None)
        like = like if entry.is_complex else like.real
        return PerExampleGradient(like.new_zeros((entry.n, *entry.shape), dtype=accumulation_dtype(like)))
    chunk = max(1, min(entry.n, CHUNK_BYTES // each))

    def of(gradients: Sequence[Tensor | None]) -> Tensor | None:
        found = passed_to_input(entry.node, entry.slot, gradients)
        return None if found is None else found.sum_to_size(shape)  # in a backward pass autograd does so

    found: list[Tensor] = []
    for start in range(0, entry.n, chunk):
        examples = range(start, min(start + chunk, entry.n))
        masked = [None if a is None else a.of_each(examples) for a in arrived]
        found.append(backward_of_each(of, masked, shape, is_complex=entry.is_complex))
    gradient = torch.cat(found)
    return PerExampleGradient(gradient.mT if entry.transposed else gradient)


@dataclass
class _Arrived:
    """The gradient of one of a node's outputs, and whose each element is."""

    gradient: Tensor
    owner: Tensor

    @classmethod
    def at(cls, entry: Entry, output: int, gradient: Tensor | None) -> _Arrived | None:
        """What arrived at an output; None if nothing did."""
        where = entry.ownership(output)
        if gradient is None or where is None:
            return None
        rows = rows_of_nested(gradient) if gradient.is_nested else gradient
        owners = owners_of(where, tuple(rows.shape), entry.n, gradient.device)
        return cls(gradient.detach(), owners.elements(rows.dim()))

    def of_each(self, examples: range) -> Tensor:
        """``[examples, ...]``: the gradient of each example's own elements, and zero for all others."""
        numbers = torch.arange(examples.start, examples.stop, device=self.owner.device)
        own = numbers.reshape(-1, *(1 for _ in self.gradient.shape)) == self.owner
        return torch.where(own, self.gradient, 0)

    def of_one(self, example: int) -> Tensor:
        """The gradient of an example's own elements, and zero for all others, where it may be nested."""
        own, others, start = self.gradient.clone(), self.owner != example, 0
        if not own.is_nested:
            return own.masked_fill_(others, 0)
        for part in [own.values()] if own.layout == torch.jagged else own.unbind():
            length = part.shape[0] if others.dim() == part.dim() else part.numel()
            part.masked_fill_(others[start : start + length].expand_as(part), 0)
            start += length
        return own


def _of_nested(entry: Entry, arrived: Sequence[_Arrived | None], shape: tuple[int, ...], example: int) -> Tensor:
    """An example's gradient ``[*shape]`` of what enters at a node with nested tensors, which vmap does not take."""
    found = passed_to_input(entry.node, entry.slot, [None if a is None else a.of_one(example) for a in arrived])
    if found is None:
        like = next(a.gradient for a in arrived if a is not None)
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    if found.is_nested:  # rows of all examples, which have no dimension of their own
        rows = rows_of_nested(found)
        found = rows.sum_to_size((*[1] * (rows.dim() - len(shape)), *shape[-rows.dim() :]))
    return found.sum_to_size(shape) if found.dim() >= len(shape) else found.view(shape)


def backward_of_each(
    backward: Callable[[Sequence[Tensor | None]], Tensor | None],
    gradients: Sequence[Tensor | None],
    shape: tuple[int, ...],
    *,
    is_complex: bool = False,
    sizes: Sequence[int] | None = None,
    nonlinear: Callable[[], Exception] | None = None,
    among: int = 1,
) -> Tensor:
    """``backward`` of every entry of a batch of output gradients, by vmap or, where vmap fails, in a loop.

    The result of vmap is used only if it adds up to ``backward`` of the sum (:func:`engm.torch_internals.adds_up`).

    Args:
        backward: from gradients of the outputs to the gradient ``[*shape]`` of one input, or None for zero.
        gradients: ``[batch, ...]`` for every output; None where there is none.
        shape: of the input.
        is_complex: whether the input has complex numbers.
        sizes: of the parts of the input, one behind the other, if there are several; each has to add up.
        nonlinear: the error to raise where not even the loop adds up; None: the loop's result is what is wanted.
        among: how many examples those of the batch are among, where ``backward`` may turn out not to be linear in the
            sum of all of them. No element of that is larger than so many times the largest of an example's.

    Returns:
        ``[batch, *shape]``.
    """
    given = [g for g in gradients if g is not None]

    def one(*parts: Tensor) -> Tensor:
        rest = iter(parts)
        found = backward([None if g is None else next(rest) for g in gradients])
        if found is not None:
            return found
        return (parts[0] if is_complex else parts[0].real).new_zeros(shape)

    def whole() -> Tensor:
        return one(*(g.sum(0) for g in given))

    batch = given[0].shape[0]
    if batch > 1:
        try:
            with warnings.catch_warnings():  # that an operator has no batching rule, which a user can do nothing about
                warnings.filterwarnings("ignore", "There is a performance drop")
                batched = torch.func.vmap(one)(*given)
        except (RuntimeError, ValueError):
            pass  # an operator has no batching rule; if the error has another reason, the loop below raises it again
        else:
            if _all_add_up(batched, whole(), sizes):
                if nonlinear is not None and among > batch:
                    _check_multiples(one, given, batched, among, nonlinear)
                return batched
    each = torch.stack([one(*(g[i] for g in given)).detach() for i in range(batch)])
    if nonlinear is not None and batch > 1 and not _all_add_up(each, total := whole(), sizes):
        # Or nothing but rounding is left.
        of_each = torch.stack([g.detach().reshape(batch, -1).abs().amax(1) for g in given if g.numel()]).sum(0)
        largest = int(of_each.argmax())
        for gradients_of, found in (([g[largest] for g in given], each[largest]), ([g.sum(0) for g in given], total)):
            doubled = one(*(2 * g for g in gradients_of))
            # What overflows tells nothing: a gradient scaler tries a smaller scale then.
            if bool(doubled.isfinite().all()) and not is_multiplied(doubled, found, gradients_of):
                raise nonlinear()
    if nonlinear is not None and among > batch:
        _check_multiples(one, given, each, among, nonlinear)
    return each


def _check_multiples(
    one: Callable[..., Tensor],
    given: Sequence[Tensor],
    found: Tensor,
    among: int,
    nonlinear: Callable[[], Exception],
) -> None:
    """Refuses a backward pass that makes something else of many times an example's gradients than as many times that.

    Args:
        one: the backward pass of one example.
        given: gradients ``[batch, ...]``.
        found: what it made of them, ``[batch, ...]``.
        among: how many times.
        nonlinear: the error to raise.
    """
    times = 1 << (among - 1).bit_length()
    for k, own in enumerate(found):
        gradients = [g[k] for g in given]
        multiplied = one(*(times * g for g in gradients)).detach()
        # What overflows tells nothing: a gradient scaler tries a smaller scale then.
        if bool(multiplied.isfinite().all()) and not is_multiplied(multiplied, own, gradients, times):
            raise nonlinear()


def _all_add_up(each: Tensor, whole: Tensor, sizes: Sequence[int] | None) -> bool:
    if sizes is None:
        return adds_up(each, whole)
    return all(map(adds_up, each.split(list(sizes), -1), whole.split(list(sizes), -1)))
