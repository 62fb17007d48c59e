"""Files of weights that anybody may have written: read without running what is in them, and told from one another."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_untrusted(path: Path) -> Any:
    """What a file holds, on the CPU; no code in it is run.

    Args:
        path: a ``.safetensors`` file, or what ``torch.save`` wrote: tensors and plain containers.

    Raises:
        ValueError: it is neither, cannot be read, or holds other objects than these.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: no safetensors file, it cannot be read as weights: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        other = re.search(r"GLOBAL (\S+)", str(error))
        if other is None:
            raise ValueError(f"{path}: not a file that torch.save or safetensors wrote") from error
        raise ValueError(
            f"{path} holds a {other[1]} beside tensors and plain values, and such files can run any code when they are "
            'loaded. Where you trust it: torch.save(torch.load(FILE, weights_only=False)["state_dict"], "weights.pt"), '
            "or whatever its weights are called"
        ) from error
    except Exception as error:  # torch has errors of many kinds for files that are not its own
        raise ValueError(f"{path}: not a file that torch.save or safetensors wrote: {error}") from error


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """Sixteen digits that differ if a name, a shape, a type or a bit of the weights does."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()[:16]
