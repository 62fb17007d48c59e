"""Kernels that give the same bits at every run, for passes whose results are compared.

A sum of a CUDA kernel may be added up in another order at every run. That is a matter of the last bits, until a number
is a difference of larger ones, or is rounded to TF32 afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.utils.deterministic


@dataclass
class Unrepeatable:
    """What torch said, within :func:`repeatable_kernels`, of operators that have no such kernel.

    Attributes:
        warnings: one sentence each; filled when the context ends.
    """

    warnings: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.warnings)


@contextmanager
def repeatable_kernels(device: torch.device) -> Iterator[Unrepeatable]:
    """A context in which a CUDA device runs kernels that give the same bits at every run, wherever torch has such.

    On the CPU nothing is switched: its kernels repeat. Warnings of torch that an operator has no such kernel are not
    shown.

    Args:
        device: where the kernels run.
    """
    found = Unrepeatable()
    if device.type != "cuda":
        yield found
        return
    cudnn, fill = torch.backends.cudnn, torch.utils.deterministic
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    before = cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=warn_only or not enabled)
    cudnn.deterministic, cudnn.benchmark = True, False
    fill.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = before  # type: ignore[attr-defined]
        for warning in caught:
            text = str(warning.message)
            if "deterministic" not in text:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            elif "CuBLAS" not in text:  # which repeats on one stream
                found.warnings.append(text.splitlines()[0])
