"""What this installation of engm was built with, and whether its kernels are right on the devices at hand."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import _C

try:
    __version__ = version("engm")
except PackageNotFoundError:  # a source tree on the path, built in place and not installed
    __version__ = "0+unknown"


def build_info() -> dict[str, Any]:
    """Versions, CUDA architectures compiled in, and which kernels are live on this machine.

    Returns:
        A dict of plain values; print it into bug reports. ``cpu_parallel`` is what the loops of the CPU operators were
        compiled to: ``"OpenMP"``, ``"native"`` (torch's own threads) or ``"none (serial)"``. ``distrusted`` lists the
        kernels that failed their trials on first use (see :func:`self_test`), in whose place ATen computes.
    """
    info = dict(_C.build_info())
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    return {
        "engm": __version__,
        "torch": torch.__version__,
        "cuda_available": torch.cuda.is_available(),
        **info,
        "distrusted": [f"{device}: {name}" for device in devices for name in distrusted(device)],
    }


def distrusted(device: torch.device) -> tuple[str, ...]:
    """The kernels that failed their trials on a device, as ``"gram_norm in tf32 (why)"``; torch replaces them."""
    return tuple(f"{kernel} in {precision} ({why})" for kernel, precision, why in _C.distrusted(device))


@dataclass(frozen=True)
class KernelTrial:
    """One comparison of a kernel with torch's operators in float64.

    Attributes:
        kernel: the family of kernels.
        precision: ``"float64"``, ``"float32"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"``.
        problem: operator and shapes.
        error: the largest difference, as a part of the largest number expected.
        limit: the error that rounding explains.
        failure: why nothing was computed; empty if something was.
    """

    kernel: str
    precision: str
    problem: str
    error: float
    limit: float
    failure: str

    @property
    def ok(self) -> bool:
        """Whether the kernel may be used, as far as this trial can tell."""
        return not self.failure and self.error <= self.limit


@dataclass(frozen=True)
class SelfTestReport:
    """What :func:`self_test` found; prints as a table with a line for every kernel and precision.

    Attributes:
        device: where.
        trials: all of them.
    """

    device: str
    trials: tuple[KernelTrial, ...]

    @property
    def ok(self) -> bool:
        """Whether every kernel passed every trial."""
        return all(trial.ok for trial in self.trials)

    @property
    def failed(self) -> tuple[KernelTrial, ...]:
        """The trials that were not passed."""
        return tuple(trial for trial in self.trials if not trial.ok)

    def __str__(self) -> str:
        worst: dict[tuple[str, str], list[KernelTrial]] = {}
        for trial in self.trials:
            worst.setdefault((trial.kernel, trial.precision), []).append(trial)
        lines = [f"kernels on {self.device}, against torch's operators in float64"]
        lines.append(f"{'kernel':<16}{'precision':<11}{'trials':>6}  {'error':>8}  {'limit':>8}")
        for (kernel, precision), trials in worst.items():
            last = max(trials, key=lambda trial: (not trial.ok, bool(trial.failure), trial.error / trial.limit))
            verdict = "" if last.ok else f"  WRONG: {last.failure or last.problem}"
            lines.append(
                f"{kernel:<16}{precision:<11}{len(trials):>6}  {last.error:>8.0e}  {last.limit:>8.0e}{verdict}"
            )
        return "\n".join(lines)


def self_test(device: torch.device | str | None = None) -> SelfTestReport:
    """Try every kernel in every precision on a device, against torch's operators in float64.

    On a CUDA device engm does that for each kernel when it is first used, and uses torch's operators in the place of
    one that fails: a card or a toolkit that nobody has tried costs speed, never a number. This function tries all of
    them, and what it finds holds from then on. It draws from generators of its own, and waits for the device.

    Args:
        device: where; default CUDA where engm has kernels for it and there is such a device, else the CPU.

    Raises:
        RuntimeError: this build has no kernels for the device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() and _C.build_info()["cuda"] else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return SelfTestReport(str(device), tuple(KernelTrial(*row) for row in _C.self_test(device)))
