"""Which of the tensors that were computed from parameters are one tensor, computed several times.

A network that calls a layer with ``weight_norm`` at every step of a recurrence computes the same weight at every step.
Gradients of such tensors may be added up before they are pulled back to the parameters.

The pull-back of a tensor is a product of the backward passes of nodes, and the backward pass of a node is a function of
what the node saved. So two tensors have the same pull-back if their nodes are of the same operators, saved the same
options and equal tensors, and go back to the same leaves, whatever the forward pass did in between: a dropout's mask or
a parameter that was changed in place gives saved tensors that differ.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..torch_internals import (
    decided,
    entering_dtype,
    is_python_function,
    is_recorded,
    leaf_of,
    node_name,
    node_outputs,
    operator_name,
    saved_options,
    saved_tensor_names,
    saved_tensors_of,
    unrecorded,
)

# Operators that hand on the elements of their input as they are, each at most once: gradients keep their norm.
REARRANGING = frozenset(
    [
        "T",
        "Transpose",
        "Permute",
        "View",
        "ReshapeAlias",
        "UnsafeView",
        "Unsqueeze",
        "Squeeze",
        "Slice",
        "Select",
        "Split",
        "SplitWithSizes",
        "Unbind",
        "Clone",
        "Alias",
        "ToCopy",
        "Tap",
    ]
)

# Operators whose nodes show all that their backward pass reads. Others are the same as no other.
_ARRANGE = ("Expand", "Stack", "Diagonal", "Tril", "Triu")
_COUNT = ("Add", "Sub", "Mul", "Div", "Neg", "Pow", "Square", "Sqrt", "Rsqrt", "Reciprocal", "Exp", "Log", "Abs", "Sin")
_BEND = ("Tanh", "Sigmoid", "Softplus", "Relu", "Softmax", "LogSoftmax", "Clamp", "ClampMin", "ToCopy", "Cos", "Where")
_SUM = ("Sum", "Mean", "Norm", "LinalgVectorNorm", "Mm", "Bmm", "Addmm", "Mv", "Dot", "WeightNormInterface")
_SOLVE = ("LinalgMatrixExp", "LinalgSolveEx", "LinalgInvEx", "LinalgHouseholderProduct", "NativeLayerNorm")
COMPARED = REARRANGING | frozenset((*_ARRANGE, *_COUNT, *_BEND, *_SUM, *_SOLVE))


def rearranges(node: Any) -> bool:
    """Whether a node hands on elements of its input as they are, each at most once, so that gradients keep their norm.

    They do not where a real tensor is taken for a complex one: the imaginary parts of gradients end there.
    """
    if operator_name(node) not in REARRANGING:
        return False
    (edge,) = [edge for edge in node.next_functions if edge[0] is not None]
    return entering_dtype(*edge).is_complex == node_outputs(node)[0].dtype.is_complex


class Numbering:
    """Numbers of nodes. The outputs of nodes of one number have the same pull-back if what they saved is equal.

    Attributes:
        compared: pairs of saved tensors, of which that is not known yet.
    """

    def __init__(self) -> None:
        self.compared: list[tuple[Tensor, Tensor]] = []
        self._numbers: dict[Any, Hashable] = {}  # of nodes
        self._saved: dict[Hashable, list[Tensor]] = {}  # by the first node of a number

    def of(self, node: Any) -> Hashable:
        """The number of a node; nodes are gone through from the leaves."""
        pending = [node]
        while pending:
            last = pending[-1]
            behind = [child for child, _ in last.next_functions if child is not None and child not in self._numbers]
            if behind and last not in self._numbers:
                pending += behind
                continue
            pending.pop()
            if last not in self._numbers:
                self._numbers[last] = self._number(last)
        return self._numbers[node]

    def _number(self, node: Any) -> Hashable:
        leaf = leaf_of(node)
        if leaf is not None:
            return id(leaf)
        if operator_name(node) not in COMPARED or is_python_function(node):
            return node
        try:
            saved = [t for kept in saved_tensor_names(node) for t in saved_tensors_of(node, kept) if t is not None]
        except RuntimeError:  # what was saved is gone, or may not be asked for here
            return node
        behind = tuple(
            (None if child is None else self._numbers[child], number) for child, number in node.next_functions
        )
        made = tuple((tuple(output.shape), output.dtype) for output in node_outputs(node))
        kinds = tuple((tuple(t.shape), t.dtype, t.device) for t in saved)
        number = (node_name(node), saved_options(node), behind, made, kinds)
        first = self._saved.setdefault(number, saved)
        self.compared += [(a, b) for a, b in zip(first, saved, strict=True) if not _is_same_memory(a, b)]
        return number


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    with unrecorded():
        return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def same_tensors(made: Sequence[tuple[Any, int]]) -> list[int]:
    """For every tensor the place of the first one in the list that has the same pull-back.

    Args:
        made: the node that made the tensor, and which of the node's outputs it is.
    """
    own = list(range(len(made)))
    if len({(operator_name(node), number, tuple(node_outputs(node)[number].shape)) for node, number in made}) == len(
        made
    ):
        return own
    numbering = Numbering()
    first: dict[Hashable, int] = {}
    found = [first.setdefault((numbering.of(node), number), place) for place, (node, number) in enumerate(made)]
    return found if _all_equal(numbering.compared) else own


def _all_equal(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the tensors of every pair are equal; a device is waited for once."""
    if not pairs:
        return True
    if not any(a.is_cuda for a, _ in pairs) and not is_recorded():
        return all(torch.equal(a, b) for a, b in pairs)
    return decided(torch.stack([torch.eq(a, b).all() for a, b in pairs]).all())
