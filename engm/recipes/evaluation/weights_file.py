"""Weights of networks that somebody else trained: read from a file, and brought under the names of a network here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..storage.weights_files import read_untrusted

NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
"""Names under which files keep their weights, beside an epoch or an optimizer."""

# How files name the mean and the deviation by which a network normalises its inputs.
_NORMALISATION = (("mean", "std"), ("mu", "sigma"), ("new_mean", "new_std"))
_SHOWN = 3  # names in a message
_COUNTER = "num_batches_tracked"  # of batch norms; older files do not have it, and evaluation does not read it


@dataclass(frozen=True)
class ForeignWeights:
    """What a file says of a network.

    Attributes:
        weights: by the names of the network here.
        mean: of the input normalisation in front of the network; None if the file has none.
        std: its deviation.
    """

    weights: dict[str, Tensor]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names, on the CPU; no code in the file is run.

    Args:
        path: a safetensors file, or what ``torch.save`` wrote: a ``state_dict``, or a dictionary with one in it under
            one of the names :data:`NESTED`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is neither, holds other objects than tensors and plain values, or no weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return _tensors(read_untrusted(path), path)


def fitted(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], about: str, passed_over: Sequence[str] = ()
) -> ForeignWeights:
    """The weights of a file under the names of a network here.

    What all names have in front (``module.``, ``model.``, ``1.`` and the like) is taken off. Of the tensors that are
    left over two may be the mean and the deviation of an input normalisation; any others are refused, because the file
    is of another network then.

    Args:
        found: see :func:`read_weights`.
        expected: ``state_dict`` of the network here.
        about: the file and the network, for the messages.
        passed_over: names of modules that the file may have besides, which do nothing.

    Raises:
        ValueError: the names or shapes are not those of the network, or it is not clear which tensors are meant.
    """
    needed = [name for name in expected if not name.endswith(_COUNTER)]
    if not needed:
        raise ValueError(f"{about}: the network has no weights that a file could give it")
    prefix = _prefix(found, needed, about)
    weights = {name: found[prefix + name] for name in expected if prefix + name in found}
    wrong = [name for name, tensor in weights.items() if tensor.shape != expected[name].shape]
    if wrong:
        shapes = [f"{n} is {list(weights[n].shape)}, expected {list(expected[n].shape)}" for n in wrong]
        raise ValueError(f"{about}: shapes differ: {_listed(shapes)}; is it another network?")
    others = {name: tensor for name, tensor in found.items() if not _copy_of(name, tensor, weights)}
    mean, std = _normalisation(others, about)
    idle = tuple(f"{prefix}{name}." for name in passed_over)
    left = [name for name in others if not _is_normalisation(name) and not name.startswith(idle)]
    if left:
        raise ValueError(
            f"{about}: the file has {len(left)} tensors that the network has not ({_listed(left)}); is it another one?"
        )
    return ForeignWeights({**expected, **weights}, mean, std)


def _tensors(found: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(found, Mapping):
        inner = next((found[name] for name in NESTED if isinstance(found.get(name), Mapping)), None)
        if inner is None:
            break
        found = inner
    tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        keys = f" with the keys {_listed(map(str, found))}" if isinstance(found, Mapping) else ""
        raise ValueError(
            f"{path}: no weights in it: expected a state_dict, or a dictionary with one under {', '.join(NESTED)}; got "
            f"a {type(found).__name__}{keys}"
        )
    return tensors


def _prefix(found: Mapping[str, Tensor], needed: list[str], about: str) -> str:
    """What stands in front of every needed name in the file."""
    first = needed[0]
    candidates = [name.removesuffix(first) for name in found if name == first or name.endswith(f".{first}")]
    missing = {prefix: [name for name in needed if prefix + name not in found] for prefix in candidates or [""]}
    whole = [prefix for prefix in candidates if not missing[prefix]]
    if not whole:
        prefix = min(missing, key=lambda one: len(missing[one]))
        lost = missing[prefix]
        raise ValueError(
            f"{about}: {len(lost)} of the network's {len(needed)} tensors are not in the file ({_listed(lost)}); the "
            f"file has {_listed(found)}: is it another network?"
        )
    for other in whole[1:]:
        if not all(torch.equal(found[whole[0] + name], found[other + name]) for name in needed):
            raise ValueError(
                f"{about}: the file holds several networks, under {', '.join(repr(prefix) for prefix in whole)}: save "
                "one of them alone"
            )
    return whole[0]


def _copy_of(name: str, tensor: Tensor, weights: Mapping[str, Tensor]) -> bool:
    """Whether a tensor of the file is one of the weights, or a copy of one under another prefix."""
    parts = name.split(".")
    tails = (".".join(parts[start:]) for start in range(len(parts)))
    known = next((weights[tail] for tail in tails if tail in weights), None)
    return known is not None and (known.shape == tensor.shape and torch.equal(known, tensor))


def _is_normalisation(name: str) -> bool:
    return any(name.rpartition(".")[2] in pair for pair in _NORMALISATION)


def _normalisation(
    others: Mapping[str, Tensor], about: str
) -> tuple[tuple[float, ...], tuple[float, ...]] | tuple[None, None]:
    """Mean and deviation that the file keeps beside the network."""
    found: set[tuple[tuple[float, ...], tuple[float, ...]]] = set()
    for name, tensor in others.items():
        stem, dot, last = name.rpartition(".")
        for mean, std in _NORMALISATION:
            if last == mean and stem + dot + std in others:
                found.add((_values(tensor), _values(others[stem + dot + std])))
    if len(found) > 1:
        raise ValueError(f"{about}: the file has several input normalisations, {sorted(found)}: save the network alone")
    if not found:
        return None, None
    return found.pop()


def _values(tensor: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 8) for value in tensor.flatten().tolist())


def _listed(names: Any) -> str:
    shown = list(names)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
