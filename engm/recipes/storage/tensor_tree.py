"""Trees of plain containers, numbers and tensors, as named tensors plus JSON, and back bit for bit."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = frozenset(
    {
        torch.bool,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.complex64,
    }
)
"""What safetensors both writes and reads."""

_JSON_INTS = 2**53  # beyond it other readers of JSON round
_INFINITY = float("inf")
_RESERVED = "__metadata__"  # safetensors' own entry


def flatten(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Takes a tree apart.

    Args:
        tree: nested ``dict`` (keys of ``str`` and ``int``, in their order), ``list`` and ``tuple`` of tensors, ``int``,
            ``float``, ``bool``, ``str`` and ``None``. An ``OrderedDict`` comes back as a ``dict``, an
            ``nn.Parameter`` as a tensor.

    Returns:
        The tensors by their path in the tree (``"optimizer/state/0/exp_avg"``), each a contiguous copy on the CPU, so
        that tensors which share storage, or change later, are stored by themselves; and the rest as lists, objects,
        strings and finite numbers for ``json.dumps``.

    Raises:
        TypeError: anything else, named by its path; also a tensor that is not dense, has no data (device ``meta``), or
            has a dtype outside of :data:`DTYPES`.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _take_apart(tree, "", tensors)


def unflatten(tensors: Mapping[str, Tensor], structure: Any) -> Any:
    """The inverse of :func:`flatten`.

    Args:
        tensors: tensors by name; they are put in the tree as they are, not copied.
        structure: the second result of :func:`flatten`, possibly through JSON.

    Raises:
        ValueError: ``structure`` was not made by :func:`flatten`, or names a tensor that ``tensors`` lacks.
    """
    if structure is None or isinstance(structure, bool | int | float | str):
        return structure
    if isinstance(structure, list):
        return [unflatten(tensors, entry) for entry in structure]
    if isinstance(structure, dict) and len(structure) == 1:
        ((kind, content),) = structure.items()
        if kind == "dict":
            return {_scalar_back(key): unflatten(tensors, entry) for key, entry in content}
        if kind == "tuple":
            return tuple(unflatten(tensors, entry) for entry in content)
        if kind == "tensor":
            if content not in tensors:
                raise ValueError(f"the tensor {content!r} is missing")
            return tensors[content]
        return _scalar_back(structure)
    raise ValueError(f"expected a structure made by flatten, got {structure!r}")


def _take_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    # Exact types: a subclass (Counter, torch.Size, IntEnum, numpy.float64) would come back as something else.
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return _scalar(value)
    if kind is list:
        return _entries(value, path, tensors)
    if kind is tuple:
        return {"tuple": _entries(value, path, tensors)}
    if kind is dict or kind is OrderedDict:
        pairs = []
        for key, entry in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{_shown(path)}: keys must be str or int, got {key!r} ({type(key).__name__})")
            pairs.append([_scalar(key), _take_apart(entry, _below(path, key), tensors)])
        return {"dict": pairs}
    if kind is Tensor or kind is nn.Parameter:
        name = _free_name(path, tensors)
        tensors[name] = _copied(value, path)
        return {"tensor": name}
    raise TypeError(
        f"{_shown(path)}: expected dict, list, tuple, Tensor, int, float, bool, str or None, got {kind.__module__}."
        f"{kind.__qualname__}; make it one of these first"
    )


def _entries(values: list[Any] | tuple[Any, ...], path: str, tensors: dict[str, Tensor]) -> list[Any]:
    return [_take_apart(entry, _below(path, index), tensors) for index, entry in enumerate(values)]


def _scalar(value: str | int | float | bool | None) -> Any:
    """A JSON value that comes back exactly: what JSON cannot hold, or other readers would change, in hexadecimal."""
    if isinstance(value, float) and not -_INFINITY < value < _INFINITY:
        return {"float": struct.pack(">d", value).hex()}  # the very bits: a NaN has a sign and a payload
    if isinstance(value, int) and abs(value) > _JSON_INTS:
        return {"int": hex(value)}
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        return {"str": value.encode("utf-8", "surrogatepass").hex()}  # JSON would join two halves into one character
    return value


def _scalar_back(value: Any) -> Any:
    match value:
        case {"float": str(bits)}:
            return struct.unpack(">d", bytes.fromhex(bits))[0]
        case {"int": str(digits)}:
            return int(digits, 16)
        case {"str": str(encoded)}:
            return bytes.fromhex(encoded).decode("utf-8", "surrogatepass")
        case str() | int():
            return value
    raise ValueError(f"expected a number or string stored by flatten, got {value!r}")


def _copied(tensor: Tensor, path: str) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type == "meta":
        raise TypeError(
            f"{_shown(path)}: expected a dense tensor with data, got layout {tensor.layout} on {tensor.device}"
            f"{', nested' if tensor.is_nested else ''}"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{_shown(path)}: safetensors does not hold {tensor.dtype}; convert or view it first")
    resolved = tensor.detach().resolve_conj().resolve_neg()
    return resolved.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _free_name(path: str, tensors: Mapping[str, Tensor]) -> str:
    """The path, made different from the names in use: ``{"a/b": x, "a": {"b": y}}`` has two tensors at ``a/b``."""
    name = path.encode("utf-8", "backslashreplace").decode() or "tensor"
    while name in tensors or name == _RESERVED:
        name += "'"
    return name


def _below(path: str, key: str | int) -> str:
    # hex beyond JSON's integers: Python refuses to write very long ones in decimal
    shown = hex(key) if isinstance(key, int) and abs(key) > _JSON_INTS else str(key)
    return f"{path}/{shown}" if path else shown


def _shown(path: str) -> str:
    return path or "the root of the tree"
