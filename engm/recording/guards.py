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
from ..torch_internals import own_buffers, version_of

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
OF_A_MODULE = frozenset(nn.Module().__dict__)  # what torch itself keeps in every module


def of_leaf(leaf: Any) -> Hashable:
    """What a program depends on of one of a step's arguments."""
    if isinstance(leaf, Tensor):
        layout = leaf.stride() if leaf.layout == torch.strided else leaf.layout
        return type(leaf), tuple(leaf.shape), layout, leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), leaf


def of_network(model: GradNormModule) -> Hashable:
    """What a program depends on of the network."""
    modules = [module for _, module in named_modules(model.unwrap())]
    parts = parts_of(modules)
    for module in modules:
        parts += _options(vars(module), OF_A_MODULE - {"training"})
        for name, buffer in own_buffers(module).items():
            if buffer is not None:
                # Indices are baked in wherever the engine has looked at them; counters change at every step.
                version = 0 if buffer.is_floating_point() or buffer.dim() == 0 else version_of(buffer)
                parts += (name, id(buffer), buffer.dtype, buffer.device, buffer.shape, version)
    parts += [(p.device, p.shape, p.layout) for p in model.unwrap().parameters()]
    parts += (model.batch_norm, model.strict, model.coupled)
    return tuple(parts)


def of_object(thing: Any, counters: Sequence[str] = ()) -> Hashable:
    """The plain attributes of an object, but for counters."""
    return tuple(_options(vars(thing), counters))


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


def _options(attributes: dict[str, Any], left_out: Any) -> list[Any]:
    """Names and values of the attributes that are plain values, or tuples and lists of such."""
    found: list[Any] = []
    for name, value in attributes.items():
        if name not in left_out:
            if isinstance(value, PLAIN):
                found += (name, type(value), value)
            elif isinstance(value, tuple | list):
                found += (name, *_plain_values(value))
    return found


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
