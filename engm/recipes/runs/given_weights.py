"""Weights that a run starts from: out of a run folder, a checkpoint of ours, a state_dict or a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import RunConfig
from ..storage.checkpoint import CheckpointStore
from ..storage.weights_files import read_untrusted
from ..training.initial import Initial
from .contents import described, holds_run
from .files import LAST, RunFolder, evaluated_weights

_CHECKPOINT = "state.json"  # what tells a folder of a checkpoint from others


def given_for(folder: RunFolder, config: RunConfig) -> Initial | None:
    """The weights that a resolved configuration names with ``--init``; None where a run needs none.

    A run that goes on has weights of its own. Those that it began with are looked at then if they are still there, to
    tell whether they are the same.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: see :func:`read_weights`.
    """
    if config.init is None:
        return None
    path = Path(config.init)
    if not path.exists() and folder.store.names(LAST):
        return None
    return Initial(str(path), read_weights(path), strict=config.init_strict)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights by name, on the CPU; nothing is unpickled but tensors and plain containers.

    Args:
        path: a run folder (its best weights are taken), the folder of one of its checkpoints (the averaged weights, if
            the run averages), a ``.safetensors`` file, or a file that ``torch.save(net.state_dict(), ...)`` wrote.

    Raises:
        FileNotFoundError: nothing is there, or the run has no weights yet.
        ValueError: it is something else.
        CheckpointError: it is damaged.
    """
    if holds_run(path):
        return RunFolder(path).weights("best").weights
    if (path / _CHECKPOINT).is_file():
        state = CheckpointStore(path.parent).load(path.name)
        weights: dict[str, Tensor] = evaluated_weights(state) if "average" in state else state["net"]
        return weights
    if not path.is_file():
        what = FileNotFoundError if not path.exists() else ValueError
        raise what(
            f"--init {path}: the path {described(path)}; expected a run folder, one of its checkpoints, a state_dict "
            "(.pt) or a .safetensors file"
        )
    try:
        found = read_untrusted(path)
    except ValueError as error:
        raise ValueError(f"--init {error}") from error
    return _checked(found, path)


def _checked(found: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
        return {str(name): tensor for name, tensor in found.items()}
    if isinstance(found, Mapping):
        inner = [str(name) for name, value in found.items() if isinstance(value, Mapping)]
        what = f"a dict with the entries {', '.join(map(str, list(found)[:5]))}"
        advice = f"; save one of {', '.join(inner)} by itself" if inner else ""
    else:
        what, advice = f"a {type(found).__name__}", ""
    raise ValueError(f"--init {path}: expected a state_dict, tensors by name, got {what}{advice}")
