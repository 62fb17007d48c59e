"""Trees taken apart and put together again: bit for bit, through JSON."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections import Counter, OrderedDict
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from engm.recipes.storage.checkpoint_files import decoded, encoded
from engm.recipes.storage.tensor_tree import flatten, unflatten

DTYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32),
    *(torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64),
]
VIEWS = [lambda t: t, lambda t: t.mT if t.dim() > 1 else t, lambda t: t[..., ::2] if t.dim() else t, lambda t: t[None]]


def raw(tensor: Tensor) -> bytes:
    plain = tensor.detach().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def same(found: Any, expected: Any) -> bool:
    """Types, order of keys, and every bit."""
    if isinstance(expected, Tensor):
        kind = (expected.dtype, expected.shape, torch.device("cpu"))
        return (found.dtype, found.shape, found.device) == kind and raw(found) == raw(expected)
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        pairs = zip(found.items(), expected.items(), strict=True)
        return len(found) == len(expected) and all(all(map(same, one, other)) for one, other in pairs)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        return struct.pack("<d", found) == struct.pack("<d", expected)
    return bool(found == expected)


def there_and_back(tree: Any) -> Any:
    tensors, structure = flatten(tree)
    return unflatten(tensors, json.loads(json.dumps(structure, allow_nan=False)))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits at all, NaNs of every kind among them."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    content = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype is torch.bool:
        content = bytearray(byte % 2 for byte in content)
    whole = torch.frombuffer(content, dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    return draw(st.sampled_from(VIEWS))(whole)


any_text = st.text(st.characters(codec=None, exclude_categories=()), max_size=5)
keys = any_text | st.integers() | st.sampled_from(["__metadata__", "a/b", "a", "b", "0", 0, -1])
floats = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0]) | st.floats()
leaves = st.none() | st.booleans() | st.integers() | st.integers(-(2**600), 2**600) | floats | any_text | tensors()
trees = st.recursive(
    leaves,
    lambda below: (
        st.lists(below, max_size=4) | st.lists(below, max_size=4).map(tuple) | st.dictionaries(keys, below, max_size=4)
    ),
    max_leaves=12,
)


@given(trees)
def test_any_tree_comes_back_bit_for_bit(tree: Any) -> None:
    assert same(there_and_back(tree), tree)
    assert same(decoded(Path("unused"), encoded(tree)), tree), "through safetensors too"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 5)])
def test_every_dtype_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    assert same(decoded(Path("unused"), encoded({"t": tensor})), {"t": tensor})


AWKWARD = [math.nan, -math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e16, 2.0, 2**53 + 1, True, "\ud83d\ude00"]


@pytest.mark.parametrize("value", AWKWARD, ids=ascii)
def test_awkward_numbers_and_strings_come_back(value: Any) -> None:
    tree = {"value": value, "inside": [(value,)]}
    assert same(there_and_back(tree), tree)


def test_a_very_long_key_comes_back() -> None:
    tree = {10**5000: torch.ones(1), 2: {-(2**60): [torch.zeros(1)]}}
    assert same(there_and_back(tree), tree)


def test_names_are_paths_and_never_collide() -> None:
    one, two, three = torch.ones(1), torch.full((1,), 2.0), torch.full((1,), 3.0)
    named, _ = flatten({"optimizer": {"state": {0: {"exp_avg": one}}}})
    assert list(named) == ["optimizer/state/0/exp_avg"]
    tree = {"a/b": one, "a": {"b": two}, "a/b'": three, "c": {0: one, "0": two}, "__metadata__": three, "": two}
    assert len(flatten(tree)[0]) == 7
    assert same(there_and_back(tree), tree)


def test_tensors_that_share_storage_are_stored_by_themselves() -> None:
    base = torch.arange(1000.0)
    weight = nn.Parameter(base[:4])
    named, structure = flatten({"first": base[:3], "again": base[:3], "even": base[::500], "weight": weight})
    assert {name: tensor.untyped_storage().nbytes() for name, tensor in named.items()} == {
        "first": 12,
        "again": 12,
        "even": 8,
        "weight": 16,
    }
    assert not any(tensor.requires_grad for tensor in named.values())
    base.zero_()
    assert unflatten(named, structure)["first"].tolist() == [0, 1, 2], "a snapshot, whatever happens to the original"


def test_conjugate_and_negative_views_are_resolved() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    assert there_and_back(tensor.conj()).tolist() == [1 - 2j, 3 + 4j]
    assert there_and_back(tensor.conj().imag).tolist() == [-2, 4]


def test_an_ordered_dict_becomes_a_dict() -> None:
    found = there_and_back(OrderedDict(b=1, a=2))
    assert type(found) is dict
    assert list(found.items()) == [("b", 1), ("a", 2)]


class Level(IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    "value",
    [
        *(object(), {1}, b"bytes", print, 1j, Level.ONE, Counter("a"), torch.Size([1]), np.float64(1), np.ones(1)),
        *(
            torch.float32,
            torch.ones(1).to_sparse(),
            torch.ones(1, device="meta"),
            torch.ones(1, dtype=torch.complex128),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused_by_its_path(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^optimizer/state/0/closure: "):
        flatten({"optimizer": {"state": [{"closure": value}]}})
    with pytest.raises(TypeError, match=r"^the root of the tree: "):
        flatten(value)


@pytest.mark.parametrize("key", [1.0, None, (1,), True, b"x"])
def test_other_keys_are_refused(key: Any) -> None:
    with pytest.raises(TypeError, match=r"^a/0: keys must be str or int"):
        flatten({"a": [{key: 1}]})


@pytest.mark.parametrize("structure", [{}, {"dict": [], "tuple": []}, {"set": []}, {"tensor": "nowhere"}, object()])
def test_a_structure_of_another_make_is_refused(structure: Any) -> None:
    with pytest.raises(ValueError, match=r"missing|flatten"):
        unflatten({}, [structure])


def test_integers_are_not_limited_by_the_interpreter() -> None:
    value = 1 << (8 * sys.get_int_max_str_digits())
    assert there_and_back([value, -value]) == [value, -value]
