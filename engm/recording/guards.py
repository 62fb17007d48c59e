"""What a recorded program holds for: everything that a step reads besides the numbers in tensors.

Two steps with equal keys run the same operators: sizes, types and devices of the batch, what the network consists of,
its modes and options, the optimizer's options, the numbers that the loss function closes over, and torch's switches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.layers import named_modules, parts_of
from ..module import GradNormModule
from ..torch_internals import own_buffers, own_parameters, version_of

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
OF_A_MODULE = frozenset(nn.Module().__dict__)  # what torch itself keeps in every module


def of_leaf(leaf: Any) -> Hashable:
    """What a program depends on of one of a step's arguments."""
    if isinstance(leaf, Tensor):
        layout = leaf.stride() if leaf.layout == torch.strided else leaf.layout
        return type(leaf), tuple(leaf.shape), layout, leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), leaf


class OfNetwork:
    """What a program depends on of the network, as a number: the same one as long as, and whenever, it is the same.

    Args:
        model: the wrapper.
    """

    def __init__(self, model: GradNormModule) -> None:
        self._model = model
        self._modules: list[nn.Module] = []
        self._parts: list[Any] = []
        self._names: list[tuple[dict[str, Any], int, list[str]]] = []
        self._state: list[Any] = []
        self._number = 0
        self._numbers: dict[Hashable, int] = {}

    def number(self) -> int:
        """The number of the network as it is now."""
        state = self._now()
        if state != self._state:
            self._state = state
            self._number = self._numbers.setdefault(tuple(state), len(self._numbers))
        return self._number

    def _now(self) -> list[Any]:
        parts = parts_of(self._modules)
        if parts != self._parts or not self._modules:
            self._modules = [module for _, module in named_modules(self._model.unwrap())]
            self._parts = parts = parts_of(self._modules)
            self._names = []
        if any(len(attributes) != length for attributes, length, _ in self._names) or not self._names:
            self._names = [(vars(m), len(vars(m)), _names_of_options(vars(m))) for m in self._modules]
        state = [self._model.batch_norm, self._model.strict, self._model.coupled, *parts]
        for module, (attributes, _, names) in zip(self._modules, self._names, strict=True):
            state += [_frozen(attributes[name]) for name in names]
            state += [p.data_ptr() for p in own_parameters(module).values() if p is not None]
            for name, buffer in own_buffers(module).items():
                if buffer is not None:
                    # Indices are baked in wherever the engine has looked at them; counters change at every step.
                    version = 0 if buffer.is_floating_point() or buffer.dim() == 0 else version_of(buffer)
                    state += (name, id(buffer), buffer.dtype, buffer.data_ptr(), buffer.shape, version)
        return state


def _names_of_options(attributes: dict[str, Any]) -> list[str]:
    """The attributes of a module that are plain values, or tuples and lists of such, and the module's mode."""
    kept = [name for name in attributes if name == "training" or name not in OF_A_MODULE]
    return [name for name in kept if _is_plain(attributes[name])]


def _frozen(value: Any) -> Any:
    """The value as it is now, whatever becomes of its lists."""
    return tuple(map(_frozen, value)) if isinstance(value, tuple | list) else value


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, tuple | list) and all(map(_is_plain, value)))


def of_object(thing: Any, left_out: Sequence[str]) -> Hashable:
    """The plain attributes of an object, but for some."""
    plain = [item for item in vars(thing).items() if isinstance(item[1], (*PLAIN, tuple, list))]
    return tuple(_plain_values([item for item in plain if item[0] not in left_out]))


def of_function(function: Callable[..., Any]) -> Hashable:
    """The plain values that a function closes over or was given in advance."""
    cells = getattr(function, "__closure__", None) or ()
    held = [_content(cell) for cell in cells]
    given = [getattr(function, name, None) for name in ("__defaults__", "__kwdefaults__", "args", "keywords")]
    return tuple(_plain_values([held, given]))


def of_torch(device: torch.device) -> Hashable:
    """The switches of torch that choose operators or kernels."""
    kinds = {"cpu", device.type}
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)]
    backends = torch.backends
    return (
        tuple(autocast),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        backends.cuda.matmul.allow_tf32,
        backends.cudnn.enabled,
        backends.cudnn.allow_tf32,
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
        backends.mkldnn.enabled,
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
    )


def _plain_values(value: Any) -> Iterator[Any]:
    """The plain values in a nest, in order, and how the nest is built."""
    if isinstance(value, PLAIN):
        yield type(value)
        yield value
    elif isinstance(value, tuple | list):
        yield len(value)
        for part in value:
            yield from _plain_values(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _plain_values(key)
            yield from _plain_values(part)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None
