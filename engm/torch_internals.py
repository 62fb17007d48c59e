"""Everything that engm takes from torch without its promise: the one file to read when a new version of torch comes.

What is public in torch is used where it is needed. Names that torch may change without notice (attributes of autograd
nodes, of modules and of tensors that begin with an underscore, parts of the compiler) stand here alone, each behind a
function whose behaviour a test in ``tests/test_torch_internals*.py`` holds fast on the oldest torch that engm supports
and on the newest.
"""

from __future__ import annotations

import functools
import operator
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch.autograd.function import BackwardCFunction
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
    register_module_forward_hook,
)
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import GraphExecGroup, _CachingTorchDispatchMode, _Handle
from torch.utils.hooks import RemovableHandle

from . import _C

__all__ = ["AnyBatchNorm", "TreeSpec", "tree_flatten", "tree_leaves", "tree_unflatten"]

Node = Any  # torch.autograd.graph.Node; the nodes of C++ do not subclass it
Statistics = tuple[Tensor | None, Tensor]  # mean (None: zero) and reciprocal standard deviation

_LEAF_NODE = torch._C._functions.AccumulateGrad
SYNC_BATCH_NORM = "SyncBatchNorm"  # a function in Python
BATCH_NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", SYNC_BATCH_NORM)
# What takes packed sequences, with the sizes of their batches as the second argument.
PACKED = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, torch._VF._pad_packed_sequence)


# -- nodes of the autograd graph --------------------------------------------------------------------------------------


def node_name(node: Node) -> str:
    """``"AddmmBackward0"``, say.

    The node of a function in Python has the name of its type. On torch 2.11 the node itself does not tell any more once
    the output that it belongs to is gone.
    """
    return type(node).__name__ if is_python_function(node) else str(node.name())


def is_compiled_region(node: Node) -> bool:
    """Whether the node is of a region that ``torch.compile`` made one function of."""
    return is_kind_of_region(type(node))


def is_kind_of_region(kind: type) -> bool:
    """Whether nodes of this type are of regions that ``torch.compile`` made one function of."""
    return kind.__name__ == "CompiledFunctionBackward"


def operator_name(node: Node) -> str:
    """``"Addmm"`` for ``AddmmBackward0``; of a function of the user's a name that no operator has."""
    return _operator_of(node_name(node)) if not is_python_function(node) else _function_of(_kind(node))


@functools.lru_cache(4096)
def _function_of(kind: Any) -> str:
    """The name of a function in Python by the type of its nodes; torch's and ours have their own, as operators do."""
    name, function = _operator_of(kind.__name__), getattr(kind, "_forward_cls", None)
    place = str(getattr(function, "__module__", "elsewhere"))
    return name if place.partition(".")[0] in ("torch", "engm") else f"{name} of {place}"


def is_sync_batch_norm(node: Node) -> bool:
    """Whether the node is of torch's ``nn.SyncBatchNorm`` over several processes."""
    return operator_name(node) == SYNC_BATCH_NORM


@functools.lru_cache(4096)
def _operator_of(name: str) -> str:
    return name.rstrip("0123456789").removesuffix("Backward").rpartition("::")[2]


class Geometry(NamedTuple):
    """How a tensor lies in its memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class WrittenSlice(NamedTuple):
    """What a node knows of a view that was written into.

    Attributes:
        operator: the operator that wrote, as :func:`operator_name` has it.
        base: how the tensor lies that was written into.
        view: how the part lies that was.
    """

    operator: str
    base: Geometry
    view: Geometry


def written_slice(node: Node) -> WrittenSlice | None:
    """Where the operator of a ``CopySlices`` node wrote to; None for other nodes, and where that cannot be told."""
    found = _C.written_slice(node)
    return None if found is None else WrittenSlice(_operator_of(found[0]), Geometry(*found[1]), Geometry(*found[2]))


def leaf_of(node: Node) -> Tensor | None:
    """The leaf tensor that an ``AccumulateGrad`` node stands for; None for other nodes."""
    return node.variable if type(node) is _LEAF_NODE else None


def node_outputs(node: Node) -> Sequence[Any]:
    """What a node knows of each of its outputs: ``shape``, ``dtype`` and ``device``."""
    outputs: Sequence[Any] = node._input_metadata
    return outputs


def output_shape(node: Node, number: int = 0) -> tuple[int, ...]:
    """The shape of one output of a node."""
    return tuple(node_outputs(node)[number].shape)


def rows_of_nested(tensor: Tensor) -> Tensor:
    """The rows of all examples of a nested tensor one behind the other, detached; its elements if there are no rows."""
    tensor = tensor.detach()
    if tensor.layout == torch.jagged:
        return tensor.values()
    parts = tensor.unbind()
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(parts)
    return torch.cat([part.flatten() for part in parts])


def entering_shape(child: Node, number: int) -> tuple[int, ...]:
    """The shape of the tensor behind an edge of the graph, which may be a leaf."""
    leaf = leaf_of(child)
    return tuple(leaf.shape) if leaf is not None else output_shape(child, number)


def entering_dtype(child: Node, number: int) -> torch.dtype:
    """The dtype of the tensor behind an edge of the graph, which may be a leaf."""
    leaf = leaf_of(child)
    return leaf.dtype if leaf is not None else cast(torch.dtype, node_outputs(child)[number].dtype)


def is_python_function(node: Node) -> bool:
    """Whether the node is of a ``torch.autograd.Function``, whose saved tensors have no names.

    The type tells. To ask the node for its ``saved_tensors`` would unpack them, which may run a forward pass again.
    """
    return isinstance(node, BackwardCFunction)


def is_opaque(node: Node) -> bool:
    """Whether the node is of an operator outside of torch, which may save what it does not show."""
    return is_python_function(node) or node.name().startswith("torch::autograd::CppNode")


def saves_data(node: Node) -> bool:
    """Whether a ``torch.autograd.Function`` saved numbers that no gradient goes to, by which it may move rows."""
    return any(
        isinstance(t, Tensor) and t.is_floating_point() and not t.requires_grad and t.numel() > 1
        for t in _unpacked(node, "")
    )


def saved_by(node: Node, name: str) -> Any:
    """What an operator's node saved under ``name``, a tensor detached; None if there is no such thing.

    Attached, the tensor would keep the graph alive.
    """
    value = _unpacked(node, name)
    if not isinstance(value, Tensor):
        return value
    if is_recorded() and is_wrapped_number(value):
        with unrecorded():  # a tracer is given the number itself, which has no ``detach``
            number = torch.tensor(value.item(), dtype=value.dtype, device="cpu")
        return constant(number)
    return value.detach()


def _unpacked(node: Node, name: str) -> Any:
    """What a node saved under a name (``""``: a function in Python its tensors); None if there is no such thing.

    What lies in a checkpoint is computed anew; a backward pass that runs has its own of it nonetheless.
    """
    attribute, saved = f"_saved_{name}" if name else "saved_tensors", _in_checkpoints(node, name)
    if not saved:
        return getattr(node, attribute, None)
    with _given_anew(saved):
        return getattr(node, attribute, None)


def is_wrapped_number(value: Tensor) -> bool:
    """Whether the tensor stands for a number of Python's, as the 2 in ``2 * x``, which changes no types."""
    if value.dim() > 0 or value.is_complex():
        return False
    narrow = torch.float16 if value.is_floating_point() else torch.int8
    return torch.result_type(value, torch.empty((), dtype=narrow, device="meta")) != value.dtype


def _kind(node: Node) -> Any:
    return type(node)


@functools.cache
def _saved_names(kind: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What nodes of a kind save: names of what is no tensor, and names of tensors."""
    names = [name.removeprefix("_saved_") for name in dir(kind) if name.startswith("_saved_")]
    tensors = tuple(name for name in names if hasattr(kind, f"_raw_saved_{name}"))
    return tuple(name for name in names if name not in tensors), tensors


def saved_options(node: Node) -> tuple[Any, ...]:
    """What an operator's node saved that is no tensor: dimensions, sizes, and other arguments of the operator."""
    return tuple(_plain(getattr(node, f"_saved_{name}")) for name in _saved_names(_kind(node))[0])


def options_reader(node: Node, names: Sequence[str] | None = None) -> Callable[[Node], Hashable]:
    """Reads :func:`saved_options` of nodes of this one's kind, in a form that is good for comparing alone.

    Args:
        node: any of its kind.
        names: of the options to read; all if not given.
    """
    read = _saved_names(_kind(node))[0] if names is None else names
    attributes = [f"_saved_{name}" for name in read]
    if not attributes or any(isinstance(getattr(node, name), list) for name in attributes):
        return saved_options if names is None else lambda node: tuple([saved_option(node, name) for name in names])
    return operator.attrgetter(*attributes)


def _plain(value: Any) -> Any:
    """Lists as tuples, and numbers below zero as such, which some nodes show as unsigned ones of 64 bits."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value - 2**64 if isinstance(value, int) and value >= 2**63 else value


def saved_option(node: Node, name: str) -> Any:
    """One of the :func:`saved_options` of a node; None if it has none of that name."""
    return _plain(getattr(node, f"_saved_{name}", None))


def saved_tensor_names(node: Node) -> tuple[str, ...]:
    """The names under which a node saved tensors; a function in Python saves its tensors under no name, ``""``."""
    return ("",) if is_python_function(node) else _saved_names(_kind(node))[1]


def saved_tensors_of(node: Node, name: str) -> list[Tensor | None]:
    """The tensors that a node saved under a name, detached. Asking unpacks them."""
    value = _unpacked(node, name)
    found = value if isinstance(value, list | tuple) else (value,)
    return [tensor.detach() if isinstance(tensor, Tensor) else None for tensor in found]


def is_recomputed(node: Node) -> bool:
    """Whether what a node saved goes through hooks, as in activation checkpointing, where it is computed anew.

    Within a backward pass such a thing may be asked for once, which is by the node itself. Nothing is unpacked here.
    """
    return any(one.unpack_hook is not None for name in saved_tensor_names(node) for one in _packed(node, name))


def _packed(node: Node, name: str) -> Sequence[Any]:
    """What a node keeps in the place of the tensors that it saved under a name; nothing where there is none."""
    try:
        saved = getattr(node, f"_raw_saved_{name or 'tensors'}", ())
    except RuntimeError:  # of a function in Python whose graph was used up
        return ()
    return saved if isinstance(saved, list | tuple) else (saved,)


def attributes_of_function(node: Node) -> dict[str, Any]:
    """What a ``torch.autograd.Function`` wrote on its context besides the tensors that it saved."""
    return dict(vars(node))


def passed_to_input(node: Node, slot: int, gradients: Sequence[Tensor | None]) -> Tensor | None:
    """What a node passes on to one of its inputs for these gradients of its outputs; none of its hooks run."""
    return passed_to_inputs(node, gradients)[slot]


def passed_to_inputs(node: Node, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What a node passes on, by input, for these gradients of its outputs; none of its hooks run.

    As in a backward pass, a function in Python gets zeros for an output without a gradient.
    """
    with torch.no_grad():
        python = is_python_function(node)
        if python:
            outputs = zip(gradients, node_outputs(node), strict=True)
            gradients = [_zeros_of(output) if gradient is None else gradient for gradient, output in outputs]
        with computed_anew([node]):
            passed = node.apply(*gradients) if python else node(*gradients)
    passed = passed if isinstance(passed, tuple) else (passed,)
    if not python:
        return list(passed)
    # A function in Python returns a gradient for every argument, and has edges for its tensors alone.
    wanted = iter([g for g, needed in zip(passed, node.needs_input_grad, strict=True) if needed])
    return [None if child is None else next(wanted) for child, _ in node.next_functions]


def _zeros_of(output: Any) -> Tensor:
    return torch.zeros(tuple(output.shape), dtype=output.dtype, device=output.device)


def adds_up(batched: Tensor, whole: Tensor) -> bool:
    """Whether gradients ``[batch, *shape]`` of torch's batched backward pass sum to the gradient of the sum.

    For some operators they do not: the batched backward of ``cdist`` of torch 2.14.1 repeats the first entry. The
    comparison goes as far as rounding lets one tell.
    """
    precision = torch.finfo(whole.dtype).eps ** 0.5
    with unrecorded():  # what torch does is the same for other numbers
        return _adds_up(batched, whole, precision)


def _adds_up(batched: Tensor, whole: Tensor, precision: float) -> bool:
    scale = batched.unsqueeze(-1).flatten(1).norm(dim=1).sum()
    return bool((batched.sum(0) - whole).norm() <= precision * scale) or not bool(torch.isfinite(scale))


def is_multiplied(multiplied: Tensor, found: Tensor, given: Sequence[Tensor], times: int = 2) -> bool:
    """Whether a backward pass made ``times`` what it made before of as many times the gradients ``given``.

    But for rounding, which is none on a CPU if that is a power of two. Where all that comes out is what rounding left,
    sums in another order are as far off.
    """
    with unrecorded():
        eps = torch.finfo(found.dtype).eps
        rounding = 1e3 * eps * torch.stack([g.norm().to(found.real.dtype) for g in given]).sum()
        most = (eps**0.5 * found.norm() + rounding) * (times / 2)
        return bool((multiplied - times * found).norm() <= most) or not bool(torch.isfinite(found).all())


def hooks_pack_what_is_saved() -> bool:
    """Whether what autograd saves right now is packed: unpacking it may mean to run the forward pass again."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def selective_checkpoint() -> bool:
    """Whether code runs in a selective checkpoint, which keeps some operators' results for one backward pass.

    torch 2.13 refuses a second one; torch 2.11 may take what the first one left over for other results, and says
    nothing.
    """
    if not torch._C._len_torch_dispatch_stack():  # as always, and quicker to ask
        return False
    return any(isinstance(mode, _CachingTorchDispatchMode) for mode in _get_current_dispatch_mode_stack())


def _hook_number() -> int:
    """A number that no hook has."""
    number = RemovableHandle.next_id
    RemovableHandle.next_id += 1
    return number


def gradients_of(losses: Tensor, targets: Sequence[Any], seeds: Tensor, keep_graph: bool) -> tuple[Tensor | None, ...]:
    """The gradients of ``sum_i seeds_i losses_i`` at tensors or edges, None at those that are not reached.

    What ``torch.autograd.grad`` computes, which looks at its arguments for as long as a small layer takes.
    """
    engine = torch.autograd.Variable._execution_engine
    found = engine.run_backward(
        (losses,), (seeds,), keep_graph, False, tuple(targets), allow_unreachable=True, accumulate_grad=False
    )
    return cast(tuple[Tensor | None, ...], found)


# -- activation checkpoints -------------------------------------------------------------------------------------------

# A checkpoint runs again when a backward pass first asks for a tensor that was saved in it. Torch gives every backward
# pass a number. Under one number a checkpoint runs again once, and hands every tensor out once. Without one it runs
# again for every tensor that is asked for, and holds on to all others for as long as the graph lives.


class _Saved(NamedTuple):
    """A tensor that a node saved in a checkpoint with ``use_reentrant=False``.

    Attributes:
        checkpoint: torch's record of the checkpoint.
        holder: what the node keeps in the place of the tensor; knows by number what hands the tensor out.
        unpack: gives the tensor for the holder.
    """

    checkpoint: Any
    holder: Any
    unpack: Callable[[Any], Tensor]

    def unpacked_and_put_back(self, number: Any) -> None:
        """Have the checkpoint run again under a number, and hand this tensor out once more."""
        tensor, handle = self.unpack(self.holder), _Handle()
        self.checkpoint.recomputed[number][handle] = tensor
        self.holder.handles[number] = handle


def _saved_in_checkpoint(packed: Any) -> _Saved | None:
    """A tensor that was saved in a checkpoint; None for what is packed otherwise, or not at all."""
    unpack = getattr(packed, "unpack_hook", None)
    if unpack is None or not getattr(unpack, "__qualname__", "").startswith("_checkpoint_hook."):
        return None
    inside = dict(zip(unpack.__code__.co_freevars, unpack.__closure__, strict=True))
    return _Saved(inside["frame"].cell_contents, packed.data, unpack)


def _in_checkpoints(node: Node, name: str) -> list[_Saved]:
    """Those of the tensors that a node saved under a name that lie in checkpoints."""
    return [saved for one in _packed(node, name) if (saved := _saved_in_checkpoint(one)) is not None]


def _given_to(checkpoint: Any) -> list[_Saved]:
    """Those of the tensors that a checkpoint starts from that lie in the checkpoints around it."""
    saver = getattr(checkpoint, "input_saver", None)  # of torch 2.11
    packed = checkpoint.saved_args if saver is None else _packed(saver.grad_fn, "")
    return [saved for one in packed if (saved := _saved_in_checkpoint(one)) is not None]


_MOST_KEPT = 4  # checkpoints; a backward pass has one, and those around it


class _Recomputed:
    """What checkpoints computed anew, which is handed out as often as it is asked for.

    That of the latest checkpoints is kept, as many as are asked for at once, or :data:`_MOST_KEPT`.
    """

    def __init__(self) -> None:
        self._number = GraphExecGroup()  # torch takes it for the number of a backward pass
        self._kept: dict[Any, dict[Any, Any]] = {}  # by checkpoint, what hands out which holder's tensor; latest last
        self._asked: set[Any] = set()  # the checkpoints that are asked, and those around them

    @contextmanager
    def given(self, saved: Sequence[_Saved]) -> Iterator[None]:
        """While the context is open, whoever asks for these tensors gets them; each is handed out once."""
        before = torch._C._get_graph_exec_group()
        cast(Any, torch._C)._set_graph_exec_group(self._number)
        asked, self._asked = self._asked, set(self._asked)  # by whoever runs what asks now, a function in Python, say
        try:
            self._hand_out(saved)
            yield
        finally:
            cast(Any, torch._C)._set_graph_exec_group(before)
            self._let_go(max(_MOST_KEPT, len(self._asked)))
            self._asked = asked

    def _hand_out(self, saved: Sequence[_Saved]) -> None:
        for checkpoint, one in {one.checkpoint: one for one in saved}.items():
            self._compute(checkpoint, one)
        for one in saved:
            one.holder.handles[self._number] = self._kept[one.checkpoint][one.holder]

    def _compute(self, checkpoint: Any, saved: _Saved) -> None:
        """Run a checkpoint again, if that was not kept, by asking for a tensor of it."""
        self._asked.add(checkpoint)
        kept = self._kept.pop(checkpoint, None)
        if kept is None:
            self._hand_out(_given_to(checkpoint))
            try:
                saved.unpacked_and_put_back(self._number)
            except BaseException:
                self._forget(checkpoint)
                raise
            holders = [holder for reference in checkpoint.weak_holders if (holder := reference()) is not None]
            kept = {holder: holder.handles[self._number] for holder in holders if self._number in holder.handles}
        self._kept[checkpoint] = kept

    def _let_go(self, most: int) -> None:
        """Let go of all but the latest checkpoints."""
        for checkpoint in list(self._kept)[: max(0, len(self._kept) - most)]:
            del self._kept[checkpoint]
            self._forget(checkpoint)

    def _forget(self, checkpoint: Any) -> None:
        """Leave nothing with a checkpoint of what was computed, so that it can run again under this number."""
        for reference in checkpoint.weak_holders:
            holder = reference()
            if holder is not None:
                holder.handles.pop(self._number, None)
        for record in (checkpoint.recomputed, checkpoint.is_recomputed, checkpoint.recomp_counter):
            record.pop(self._number, None)

    def end(self) -> None:
        """Let go of all."""
        self._let_go(0)


class _Phase(threading.local):
    """What is kept while :func:`recomputed_once` is open in this thread; None at any other time."""

    def __init__(self) -> None:
        self.kept: _Recomputed | None = None


_PHASE = _Phase()


@contextmanager
def recomputed_once() -> Iterator[None]:
    """While the context is open, a checkpoint runs again once for all that is read of it in a row.

    This holds for the functions here that read what nodes saved, and for :func:`computed_anew`; backward passes besides
    go as ever. What was computed is let go of when the outermost such context is closed.
    """
    if _PHASE.kept is not None:
        yield
        return
    kept = _PHASE.kept = _Recomputed()
    try:
        yield
    finally:
        _PHASE.kept = None
        kept.end()


@contextmanager
def computed_anew(nodes: Iterable[Node]) -> Iterator[None]:
    """While the context is open, one pass through these nodes finds what they saved in checkpoints."""
    saved = [one for node in nodes for name in saved_tensor_names(node) for one in _in_checkpoints(node, name)]
    with _given_anew(saved) if saved else nullcontext():
        yield


@contextmanager
def _given_anew(saved: Sequence[_Saved]) -> Iterator[None]:
    """While the context is open, whoever asks for these tensors gets them, each once."""
    with recomputed_once(), cast(_Recomputed, _PHASE.kept).given(saved):
        yield


# -- what normalisation layers save -----------------------------------------------------------------------------------


def saved_statistics(output: Tensor, name: str) -> Statistics | None:
    """Mean and reciprocal standard deviation that autograd saved for a layer, detached.

    There are none where hooks pack what is saved (activation checkpointing), nor where the numbers were rounded to 16
    bits: the statistics have to be computed anew then.

    Args:
        output: of the layer.
        name: of the node that the layer's operator makes.
    """
    return _C.saved_statistics(output, name)


def saved_rstd(output: Tensor) -> Tensor | None:
    """The reciprocal root mean square that autograd saved for an RMS norm, in the dtype that the layer computed in.

    Autocast may have cast the layer's input, and changed the default epsilon with it.
    """
    node = output.grad_fn
    if hooks_pack_what_is_saved() or node is None or not node_name(node).startswith("FusedRmsNormBackward"):
        return None
    rstd = saved_by(node, "result1")
    return rstd if isinstance(rstd, Tensor) and rstd.numel() else None


def is_narrow(tensor: Tensor) -> bool:
    """Whether the numbers have 16 bits."""
    return tensor.dtype in (torch.float16, torch.bfloat16)


def batch_norm_statistics(node: Node) -> tuple[Tensor, Tensor, bool] | None:
    """What the batch norm behind an autograd node normalised with; no module is needed.

    Reading it unpacks what the node saved, as its backward pass does: that runs hooks on saved tensors, and fails if
    running statistics in use have been changed in place since.

    Args:
        node: of ``F.batch_norm`` on any device, or of ``nn.SyncBatchNorm`` over several processes.

    Returns:
        Mean ``[C]`` and reciprocal standard deviation ``[C]``, detached, and whether they are the batch's (in training
        mode, or without running statistics) and thus couple the examples. None for other nodes.
    """
    if is_sync_batch_norm(node):
        _, _, mean, rstd, _ = _unpacked(node, "")
        return mean.detach(), rstd.detach(), True
    if operator_name(node) not in BATCH_NORMS:
        return None
    if saved_by(node, "training"):
        return saved_by(node, "result1"), saved_by(node, "result2"), True
    eps = saved_by(node, "eps") if hasattr(node, "_saved_eps") else saved_by(node, "epsilon")  # cuDNN's has a long name
    return saved_by(node, "running_mean"), torch.rsqrt(saved_by(node, "running_var") + eps), False


def batch_norm_inputs(node: Node) -> tuple[Tensor | None, Tensor | None]:
    """The input ``[n, C, *S]`` and the scale ``[C]`` that the batch norm behind a node saved, detached."""
    if is_python_function(node):
        inputs, weight = _unpacked(node, "")[:2]
        return inputs.detach(), None if weight is None else weight.detach()
    return saved_by(node, "input"), saved_by(node, "weight")


# -- tensors ----------------------------------------------------------------------------------------------------------


def address_of(tensor: Tensor) -> int:
    """The address of the tensor's memory; 0 where there is none (inside of a function transform)."""
    return _C.address_of(tensor.values() if tensor.is_nested else tensor)


def version_of(tensor: Tensor) -> int:
    """A number that every in-place operation on the tensor changes; 0 in inference mode, which counts none."""
    return 0 if tensor.is_inference() else tensor._version


def is_view(tensor: Tensor) -> bool:
    """Whether autograd tracks the tensor as a view of another one."""
    return tensor._is_view()


def untracked_alias(tensor: Tensor) -> Tensor:
    """The same numbers in the same memory, which autograd does not track as a view: in-place operations may follow."""
    if torch.compiler.is_compiling():
        return cast(Tensor, torch.ops.aten._unsafe_view(tensor, tensor.shape))
    return _C.untracked_alias(tensor)


def has_gradient_hooks(parameters: Iterable[Any]) -> bool:
    """Whether hooks hang on some of the parameters that only autograd's own accumulation runs."""
    return any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in parameters)


def norms_of_each(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The Euclidean norm of each tensor, 0-dimensional, by few kernels; formed in ``dtype``, default the tensor's."""
    return list(torch._foreach_norm(tensors, 2, dtype))


def differences_of_each(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """The first tensors minus the second ones, by few kernels."""
    return list(torch._foreach_sub(first, second))


def copy_each(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy every source into its target by one call, which an interrupt cannot leave half done."""
    torch._foreach_copy_(targets, sources)


def keep_device_busy(cycles: int) -> None:
    """Make the current CUDA stream wait for so many clock cycles, while the host goes on."""
    torch.cuda._sleep(cycles)


# -- modules ----------------------------------------------------------------------------------------------------------

# The dicts of a module that a wrapper shares with its network, so that all of torch sees and changes the same.
STATE_OF_A_MODULE = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
CALL_OF_A_MODULE = ("forward", "_is_full_backward_hook", "_compiled_call_impl")  # what a call of this very module runs


def own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """The parameters that the module holds itself, by name; None for one that was left out."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers that the module holds itself, by name; what is written into the dict is the module's."""
    return module._buffers


def own_children(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """The modules that the module holds itself, by name, also those that it holds twice."""
    return module._modules


def hooks_of(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """The hooks that hang on the module's calls, of all kinds."""
    own = module.__dict__
    return own["_forward_pre_hooks"], own["_forward_hooks"], own["_backward_pre_hooks"], own["_backward_hooks"]


def hooks_of_all_modules() -> tuple[Mapping[int, Any], ...]:
    """The hooks that hang on the calls of every module."""
    return _global_forward_pre_hooks, _global_forward_hooks, _global_backward_pre_hooks, _global_backward_hooks


def trained_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those of the module's own parameters that require grad, by name."""
    return _C.trained_of(module)


# The methods that torch's own layers compute their output by.
COMPUTING = ("forward", "_conv_forward", "permute_hidden")


def computes_like(kind: type[nn.Module], ancestor: type[nn.Module]) -> bool:
    """Whether a subclass left everything alone that its ancestor computes its output by."""
    return all(getattr(kind, method, None) is getattr(ancestor, method, None) for method in COMPUTING)


def rank_without_batch(instance_norm: Any) -> int:
    """The number of dimensions of an instance norm's input that has no batch dimension."""
    return int(instance_norm._get_no_batch_dim())


def recurrent_parameters(module: Any) -> tuple[str, ...]:
    """The names of all parameters of an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``."""
    return tuple(name for names in module._all_weights for name in names)


def original_of_compiled(module: nn.Module) -> nn.Module | None:
    """The module inside of what ``torch.compile(module)`` returned; None for other modules."""
    return module.__dict__.get("_modules", {}).get("_orig_mod")


def some_global_forward_hook() -> bool:
    """Whether anybody put a forward hook on all modules."""
    return bool(_global_forward_hooks)


def first_global_forward_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """A forward hook on all modules that runs before those that others put on all modules."""
    handle = register_module_forward_hook(hook, with_kwargs=True)
    cast(Any, _global_forward_hooks).move_to_end(handle.id, last=False)
    return handle


_NUMBERS: list[int] = []  # of hooks, which no hook has at the moment


class FirstForwardHooks:
    """While this context is open, a forward hook ``(module, args, kwargs, output)`` runs first on each of the modules.

    They are hung as ``module.register_forward_hook`` does, which takes as long as a small layer.

    Args:
        hooks: one a module.
    """

    def __init__(self, hooks: Mapping[nn.Module, Callable[..., Any]]) -> None:
        self._hooks = hooks
        self._number: int | None = None  # the same everywhere

    def __enter__(self) -> None:
        # A number is taken again and again: to count on in a class, as torch does, takes as long as a small layer.
        number = self._number = _NUMBERS.pop() if _NUMBERS else _hook_number()
        try:
            for module, hook in self._hooks.items():
                own: Any = module._forward_hooks
                own[number] = hook
                if len(own) > 1:
                    own.move_to_end(number, last=False)
                module._forward_hooks_with_kwargs[number] = True
        except BaseException:  # an interrupt, say
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        number, self._number = self._number, None
        if number is None:
            return
        for module in self._hooks:
            module._forward_hooks.pop(number, None)
            module._forward_hooks_with_kwargs.pop(number, None)
        _NUMBERS.append(number)


def running_data_parallel() -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` whose forward pass is running, if one is."""
    return DistributedDataParallel._active_ddp_module


def joins(data_parallel: DistributedDataParallel) -> bool:
    """Whether the wrapper runs inside ``join()``, where ranks without batches answer the reduction of gradients alone.

    torch takes nothing back when ``join()`` ends: the answer stays yes after the first one.
    """
    return bool(data_parallel._join_config.enable)


def is_transformed() -> bool:
    """Whether code runs under a transform of ``torch.func``, or is traced by ``torch.jit``."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.jit.is_tracing()


# -- the compiler -----------------------------------------------------------------------------------------------------

never_compiled: Callable[[Any], Any] = torch._disable_dynamo


def is_exported() -> bool:
    """Whether code runs, or is traced, for ``torch.export``.

    The compiler of torch 2.11 takes the public ``torch.compiler.is_exporting()`` for true in every region.
    """
    return bool(torch.compiler._is_exporting_flag)


def modes_on() -> tuple[torch.device | None, ...]:
    """The modes that take part in functions and operators now: a default device, or None for any other."""
    functions, operators = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    if not functions and not operators:
        return ()
    found = [torch._C._get_function_stack_at(number) for number in range(functions)]
    return *[mode.device if isinstance(mode, DeviceContext) else None for mode in found], *[None] * operators


def without_autocast() -> AbstractContextManager[object]:
    """While this context is open, operators take their operands as they are, whatever the caller's autocast."""
    return cast(AbstractContextManager[object], torch._C._DisableAutocast())


def is_recorded() -> bool:
    """Whether operators are being traced into a program, whose values the host may not read."""
    return bool(torch._C._len_torch_dispatch_stack()) and get_proxy_mode() is not None


@contextmanager
def quick_descriptions() -> Iterator[None]:
    """While this context is open, a tracer describes all values in one set of fake tensors, and not in one a value.

    That halves the time of tracing; what is traced is the same.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # imported here, because only a tracer needs it

    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        yield


def unrecorded() -> AbstractContextManager[object]:
    """While this context is open, operators run as they do without a tracer, and the host may read values."""
    return _disable_current_modes() if is_recorded() else nullcontext()


class Operators(TorchDispatchMode):
    """While the context is open, :meth:`before` is told of every operator.

    What an operator that is written in Python calls is a part of it: :class:`Calls` are not told of that.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            self.before(func, args, kwargs or {})
            try:
                result = func(*args, **(kwargs or {}))
            except Exception as error:
                self.failed(error)
                raise
            self.after(func, result)
        return result

    def before(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """An operator is about to run."""

    def after(self, func: Any, result: Any) -> None:
        """An operator has run."""

    def failed(self, error: Exception) -> None:
        """An operator raised an error."""


class Calls(TorchFunctionMode):
    """While the context is open and operators are traced, told of every function of torch that Python calls.

    Torch itself tells of no calls within another one. Here those within functions that are written in Python, and those
    of a backward pass, are told of as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self._within: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_recorded():
            return func(*args, **kwargs)
        self.before_call(func, args, kwargs)
        others = any(kind not in (Tensor, nn.Parameter) for kind in types)  # with a way of their own to run functions
        if others or not isinstance(func, FunctionType) or func in self._within:
            result = func(*args, **kwargs)
        else:
            self._within.append(func)
            try:
                with self:
                    result = _not_overridden(func)(*args, **kwargs)
            finally:
                self._within.remove(func)
        self.after_call(func, args, kwargs)
        return result

    def before_call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A function is about to be called; what is called here is not told of."""

    def after_call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A function has returned; what is called here is not told of."""


@functools.cache
def _not_overridden(function: FunctionType) -> FunctionType:
    """A function of torch that does not ask whether somebody else wants to run it."""

    def never(*_: Any) -> bool:
        return False

    questions = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    known = {**function.__globals__, **dict.fromkeys(questions, never)}
    copy = FunctionType(function.__code__, known, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class Memory:
    """A set of tensors' memory, which is not held, but is not mistaken for other memory either."""

    def __init__(self) -> None:
        self._held: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Tensor) -> None:
        """The tensor's memory belongs to the set."""
        if tensor.layout == torch.strided:
            reference = StorageWeakRef(tensor.untyped_storage())
            self._held[reference.cdata] = reference

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and StorageWeakRef(tensor.untyped_storage()).cdata in self._held


def is_of_others(tensor: Tensor) -> bool:
    """Whether a tensor's memory was not allocated by torch, but handed to it: by NumPy, say."""
    return tensor.layout == torch.strided and not tensor.untyped_storage().resizable()


def all_memory_of(tensor: Tensor) -> Tensor:
    """The memory that a tensor is a view of, as a vector; what is written there leaves no trace in versions."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def deciding_sizes(operator: Any, args: Sequence[Any]) -> list[Tensor]:
    """The tensors whose numbers decide how large what an operator returns is."""
    if torch.Tag.dynamic_output_shape not in operator.tags:
        return []
    if operator is torch.ops.aten.index.Tensor:
        return [part for part in args[1] if part is not None and part.dtype in (torch.bool, torch.uint8)]
    return tensors_in(args)


def tensors_in(nest: Any) -> list[Tensor]:
    """The tensors in a nest of arguments."""
    return [leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor)]


def is_operator(target: Any) -> bool:
    """Whether the target of a node of ``torch.fx`` is an operator of the dispatcher, whose overload is known."""
    return isinstance(target, torch._ops.OpOverload)


def schema_of(operator: Any) -> Any:
    """The schema of an operator: name, arguments, what it returns and writes into; None for what is none."""
    return getattr(operator, "_schema", None)


def written_operands(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What an operator writes into, of what it is given: tensors, or whatever stands for these."""
    found: list[Any] = []
    for number, argument in enumerate(schema_of(operator).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += value if isinstance(value, list | tuple) else [value]
    return [value for value in found if value is not None]


def moved_statistics(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The running statistics that a batch norm in training mode writes into, which its schema does not tell."""
    schema = schema_of(operator)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    if not {"running_mean", "momentum"} <= set(names):  # the backward pass of a batch norm has no momentum
        return []
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    trains = bool(given.get("training", given.get("train")))
    return [given[name] for name in ("running_mean", "running_var") if trains and given.get(name) is not None]


_DECISIONS: list[Tensor] = []
_SURPRISES: list[Tensor] = []
_CONSTANTS: list[Tensor] = []


def constant(value: Tensor) -> Tensor:
    """The tensor, which is the same at every step: programs may hold it, though no tracer has seen it being made."""
    if is_recorded():
        _CONSTANTS.append(value)
    return value


def take_constants() -> list[Tensor]:
    """The tensors that are :func:`constant`, since this was last asked."""
    taken = list(_CONSTANTS)
    _CONSTANTS.clear()
    return taken


def decided(value: Tensor) -> bool:
    """The truth of a 0-dimensional tensor, which the host waits for.

    Where operators are traced into a program the answer is a part of it, and :func:`take_decisions` tells of it.
    """
    if not is_recorded():
        return bool(value)
    _DECISIONS.append(value)
    with unrecorded():
        return bool(value)


def decided_for_now(value: Tensor) -> bool:
    """As :func:`decided`, where the answer may become another with the numbers that a program is run on.

    :func:`take_surprises` has what tells so.
    """
    if not is_recorded():
        return bool(value)
    with unrecorded():
        answer = bool(value)
    _SURPRISES.append(value != answer)
    return answer


def take_surprises() -> list[Tensor]:
    """What tells, when a program is run, that an answer of :func:`decided_for_now` is another, since last asked."""
    taken = list(_SURPRISES)
    _SURPRISES.clear()
    return taken


def take_decisions() -> list[Tensor]:
    """What was :func:`decided` upon while operators were traced, since this was last asked."""
    taken = list(_DECISIONS)
    _DECISIONS.clear()
    return taken


_COMPILED = [False]  # whether anything was found to be compiled; a reset of the compiler forgets it, we do not


def dynamo_in_use() -> bool:
    """Whether anything in this process was given to ``torch.compile``."""
    if not _COMPILED[0]:
        eval_frame = sys.modules.get("torch._dynamo.eval_frame")  # optimizers import it, whatever they are used for
        backends = () if eval_frame is None else eval_frame.cached_backends.values()
        _COMPILED[0] = any(backend is not None for backend in backends)  # None: of what is not to be compiled
    return _COMPILED[0]


@contextmanager
def _switched_off(config: Any, name: str) -> Iterator[None]:
    """Switch a setting of torch off for a while; torch's own ``patch`` makes a class for every use."""
    before = getattr(config, name)
    setattr(config, name, False)
    try:
        yield
    finally:
        setattr(config, name, before)


def in_operator_of_graphs() -> bool:
    """Whether a branch of ``torch.cond``, or what another operator that takes functions runs, is being traced.

    It may write into nothing outside of it. Checkpoints are such operators too in a compiled region, which may.
    """
    return torch.compiler.is_compiling() and _traced_for_operator()


def _traced_for_operator() -> bool:
    """What :func:`in_operator_of_graphs` says where something is being traced; asked by the tracer itself."""
    from torch._dynamo.symbolic_convert import InstructionTranslator  # imported here, because only a tracer needs it

    tracer: Any = InstructionTranslator.current_tx().output.current_tracer
    while tracer.parent is not None:
        if "checkpoint" not in str(tracer.source_target):
            return True
        tracer = tracer.parent
    return False


cast(Any, _traced_for_operator)._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result does


def graphs_that_can_be_kept() -> AbstractContextManager[None]:
    """Regions compiled inside do not give the memory of their saved tensors away, so that their graph can be kept."""
    import torch._functorch.config as functorch_config

    return _switched_off(functorch_config, "donated_buffer")


def guard_hooks() -> None:
    """Regions compiled from now on hold for modules with the same hooks alone."""
    import torch._dynamo.config as dynamo_config

    dynamo_config.skip_nnmodule_hook_guards = False


@contextmanager
def whatever_hooks() -> Iterator[None]:
    """Regions compiled inside hold for modules with any hooks, and those that are compiled afterwards do not."""
    import torch._dynamo.config as dynamo_config

    dynamo_config.skip_nnmodule_hook_guards = True
    try:
        yield
    finally:
        guard_hooks()


def compiled_by_inductor(module: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """The function that Inductor makes of a graph of operators for inputs like these, without Dynamo and its guards.

    It has no backward pass. Random operators draw from torch's generators what they draw eagerly, and what is written
    into an input reaches it. On the CPU the calls of the kernels are compiled too, where Inductor manages to.

    Raises:
        Exception: Inductor cannot compile it.
    """
    from torch._inductor import compile

    for node in module.graph.nodes:
        node.meta.clear()  # what the tracer noted there are tensors of another fake mode
    # The caller hands over tensors of the same sizes at every call.
    options: dict[str, Any] = {"fallback_random": True, "size_asserts": False, "alignment_asserts": False}
    with torch.no_grad():
        if all(tensor.device.type == "cpu" for tensor in inputs):
            with suppress(Exception):
                return cast(Callable[..., Any], compile(module, list(inputs), options={**options, "cpp_wrapper": True}))
        return cast(Callable[..., Any], compile(module, list(inputs), options=options))


@functools.cache
def skip_code(code: CodeType) -> None:
    """Never start a compiled region with a call of a function that has this code; the call may be a part of one."""
    from torch._dynamo.eval_frame import skip_code as skip

    skip(code)


def let_graph_be_kept(kind: type) -> None:
    """Let the graph be kept when nodes of this type run, of a compiled region that was compiled such that it can be.

    AOTAutograd takes "was not asked whether it gives memory away" for "may give it away".
    """
    metadata: Any = getattr(getattr(kind, "_forward_cls", None), "metadata", None)
    if getattr(metadata, "bw_donated_idxs", ()) is None:
        metadata.bw_donated_idxs = []


@dataclass(frozen=True)
class RegionBackward:
    """The backward pass of a compiled region, as its compiler was given it.

    Attributes:
        graph: its operators, of which none writes into a tensor that another reads.
        tangents: which output of the region's node every gradient that the graph begins with is of.
        passed: by input (slot) of the region's node, what the graph hands on there; None for zeros.
        sizes: what the symbols in shapes stand for in this very graph.
    """

    graph: torch.fx.Graph
    tangents: Mapping[torch.fx.Node, int]
    passed: Mapping[int, torch.fx.Node | None]
    sizes: Mapping[Any, int]

    def shape_of(self, node: torch.fx.Node) -> tuple[int, ...] | None:
        """The shape of the tensor that a node of the graph stands for; None where it is not known, or not a tensor."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        found = [self.number(length) for length in value.shape]
        return None if None in found else tuple(cast(list[int], found))

    def number(self, value: Any) -> int | None:
        """What a number that may have symbols in it is in this very graph; None where that is not known."""
        if isinstance(value, torch.fx.Node):
            value = value.meta.get("val")
        if isinstance(value, torch.SymInt):
            value = value.node.expr.subs(self.sizes)
            return int(value) if value.is_Integer else None
        return value if isinstance(value, int) else None


def backward_of_region(node: Node) -> RegionBackward | None:
    """The backward pass of a compiled region; None where torch does not keep it, or in another form than this one."""
    region = getattr(type(node), "_forward_cls", None)
    info, metadata = getattr(region, "_lazy_backward_info", None), getattr(region, "metadata", None)
    read = getattr(info, "bw_module_fn", None)  # where the compiled code is from torch's cache
    module = getattr(info, "bw_module", None) if read is None else read()
    plain = getattr(region, "maybe_subclass_metadata", None) is None
    if metadata is None or not (isinstance(module, torch.fx.GraphModule) and plain):
        return None
    if metadata.num_mutated_inp_runtime_indices:
        return None
    given = [other for other in module.graph.nodes if other.op == "placeholder"]
    symbols = [other.meta["val"].node.expr for other in given if isinstance(other.meta.get("val"), torch.SymInt)]
    tangents = [other for other in given if other.name.startswith("tangents")]
    outputs = [number for number, output in enumerate(metadata.output_info) if output.requires_grad]
    (last,) = (other for other in module.graph.nodes if other.op == "output")
    slots = [slot for slot, (child, _) in enumerate(node.next_functions) if child is not None]
    needed = [passed for passed, needs in zip(last.args[0], node.needs_input_grad, strict=False) if needs]
    alike = len(symbols) == len(node.symints) and len(last.args[0]) == len(node.needs_input_grad)
    if not alike or len(tangents) != len(outputs) or len(slots) != len(needed):
        return None
    sizes = {symbol: size for symbol, size in zip(symbols, node.symints, strict=True) if symbol.is_Symbol}
    found = RegionBackward(
        module.graph, dict(zip(tangents, outputs, strict=True)), dict(zip(slots, needed, strict=True)), sizes
    )
    if any(found.shape_of(tangent) != output_shape(node, number) for tangent, number in found.tangents.items()):
        return None
    return found
