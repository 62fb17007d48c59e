"""Why a step cannot be recorded, in one sentence that names the operator and the line of the user's code."""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from pathlib import Path

import torch

# Folders end in a separator: a script of the user named engm_train.py beside the package is none of ours.
OURS = os.path.join(Path(__file__).parents[1], "")
TORCHS = os.path.join(Path(torch.__file__).parent, "")
_FOLDERS = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
_LIBRARIES = (OURS, TORCHS, *(os.path.join(folder, "") for folder in sorted(_FOLDERS)))
# Of every environment and user, also of one whose packages a .pth file or PYTHONPATH adds.
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))


def of_a_library(filename: str) -> bool:
    """Whether a file of Python code is of what is installed, or of this package, and not of the user's."""
    return filename.startswith(_LIBRARIES) or any(name in filename for name in _INSTALLED)


class UnrecordableError(Exception):
    """A step cannot be recorded.

    Args:
        reason: in words.
        for_good: whether the next step of its kind cannot be either.
    """

    def __init__(self, reason: str, *, for_good: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.for_good = for_good


def in_words(error: Exception) -> str:
    """What kept a step from being recorded: what torch says, the operator, and where the user's code ran it."""
    operator = re.search(r"(?:aten|engm)[.:]+\w+|^[\w.]+(?= reads values)", str(error))
    frames = traceback.extract_tb(error.__traceback__)
    others = [frame for frame in frames if not frame.filename.startswith((OURS, TORCHS, "<"))]
    users = [frame for frame in others if not of_a_library(frame.filename)] or others
    where = f", at {Path(users[-1].filename).name}:{users[-1].lineno} ({users[-1].line})" if users else ""
    what = f"'{operator.group(0)}' " if operator else ""
    said = str(error).strip().splitlines()
    return f"{what}cannot be recorded{where}: {type(error).__name__}: {said[0] if said else ''}"
