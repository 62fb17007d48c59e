"""Which functions of torch hand values of tensors to Python past all operators, so that a tracer cannot see it.

A value that Python was given is a constant of the program that is traced, and stale at the next step. Values that are
asked for by operators (``.item()``, ``if``) are refused by :mod:`~engm.recording.state`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import currentframe
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from ..torch_internals import PACKED, Calls
from ..torch_internals import __file__ as of_calls
from .refusals import OURS

# Of these the tensor is the first argument.
READERS = frozenset(
    [
        *(Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__repr__, Tensor.__format__),
        *(Tensor.untyped_storage, Tensor.storage, Tensor.__deepcopy__, Tensor.__reduce_ex__, Tensor.apply_),
        *(Tensor.map_, Tensor.map2_, Tensor.__cuda_array_interface__.__get__),
    ]
)
# These tell where the numbers are; torch 2.11 knows the first alone.
ADDRESSES = [getattr(Tensor, name, None) for name in ("data_ptr", "const_data_ptr", "mutable_data_ptr")]
# Of these one number is asked for; where no operator tells of it, as within torch.FloatTensor([t]), nobody does.
CONVERSIONS = frozenset([Tensor.__index__, Tensor.__int__, Tensor.__float__, Tensor.__complex__, Tensor.__bool__])
# Of these some arguments, by place or name, are read on the host if they are tensors of integers: lengths and indices.
HOST_ARGUMENTS: Mapping[Any, Sequence[int | str]] = {
    **dict.fromkeys(PACKED, (1, "batch_sizes")),
    torch.ctc_loss: (2, 3, "input_lengths", "target_lengths"),
    torch.tensor_split: (1, "tensor_indices_or_sections"),
    Tensor.tensor_split: (1, "tensor_indices_or_sections"),
}
# Of a parameter a program knows what it adds to the gradient, and not what is there.
_GRADIENT: Any = Tensor.grad
GRADIENTS = frozenset([_GRADIENT.__get__, _GRADIENT.__set__, _GRADIENT.__delete__])
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


class HostReads(Calls):
    """While the context is open, functions that would hand values of tensors to Python raise RuntimeError.

    Args:
        may_be_read: whether a tensor's values are among what a program holds for.
        refuse: called with the error before it is raised, which the code of a step may catch.
        parameters: to whose gradients a program adds, so that nobody else may look at them or clear them.

    Attributes:
        of_operators: how many values operators have told of; who sees the operators counts them.
        made_constant: whether an operator made a tensor of numbers that Python knows; who sees the operators says so.
    """

    def __init__(
        self,
        may_be_read: Callable[[Tensor], bool],
        refuse: Callable[[Exception], None],
        parameters: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        self._parameters = {id(parameter) for parameter in parameters}
        self._may_be_read = may_be_read
        self._refuse = refuse
        self.of_operators = 0
        self.made_constant = False
        self._told = 0

    def before_call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if func in READERS and not self._may_be_read(args[0]):
            self._raise(func)
        # An address is of no use at the next step, unless it is that of a parameter, which programs depend on.
        if func in ADDRESSES and not isinstance(args[0], nn.Parameter):
            self._raise(func)
        if func in GRADIENTS and id(args[0]) in self._parameters and not _is_asked_by_us():
            self._fail(
                "the loss function reads, clears or changes .grad of the network's parameters, to which a recorded "
                "step adds: do that, and opt.zero_grad(), outside of it"
            )
        places = HOST_ARGUMENTS.get(func, ())
        given = [kwargs.get(place) if isinstance(place, str) else _at(args, place) for place in places]
        if any(isinstance(value, Tensor) and not value.is_floating_point() for value in given):
            self._raise(func)
        self._told, self.made_constant = self.of_operators, False

    def after_call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        unseen = func in CONVERSIONS and self.of_operators == self._told
        written_in_python = isinstance(func, FunctionType)  # which tells of what it calls
        made = self.made_constant and not written_in_python and _has_tensors_in_lists(func, args, kwargs)
        if unseen or made:
            self._raise(func)

    def _raise(self, func: Any) -> None:
        self._fail(f"{_name(func)} reads values of a tensor, which may be others at the next step")

    def _fail(self, message: str) -> None:
        error = RuntimeError(message)
        self._refuse(error)
        raise error


def _is_asked_by_us() -> bool:
    """Whether code of ours calls a function of torch that is told of, and not torch's or the user's."""
    frame: FrameType | None = currentframe()
    while frame is not None and frame.f_code.co_filename in (__file__, of_calls):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(OURS)


def _at(args: Sequence[Any], number: int) -> Any:
    return args[number] if number < len(args) else None


def _has_tensors_in_lists(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether numbers of which a function makes a tensor are tensors themselves."""
    given = [*args, *kwargs.values()]
    if func in INDEXING and isinstance(args[1], tuple):  # the indices of several dimensions, which are no numbers
        given = [args[0], *args[1], *args[2:]]
    return any(isinstance(value, list | tuple) and _has_tensors(value) for value in given)


def _has_tensors(nest: Any) -> bool:
    return any(map(_has_tensors, nest)) if isinstance(nest, list | tuple) else isinstance(nest, Tensor)


def _name(func: Any) -> str:
    """The name of a function of torch as its users write it."""
    name = str(resolve_name(func) or getattr(func, "__qualname__", func))
    return name.removeprefix("torch.") if name.startswith("torch.Tensor.") else name
