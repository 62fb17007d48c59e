"""Is this machine fit for training? Build, GPU, packages, data and disk, each with what to do about it."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

import engm

from .data.tiny_imagenet import how_to_get

State = Literal["ok", "note", "bad"]
# Name of a package, what it is for, and whether the recipes need it.
PACKAGES = (
    ("torchvision", "data sets, models", True),
    ("scikit-learn", "digits", True),
    ("safetensors", "checkpoints", True),
    ("tomli-w", "configurations", True),
    ("filelock", "run folders", True),
    ("matplotlib", "curves", True),
    ("tensorboard", "logs", False),
    ("timm", "models by timm's names", False),
    ("pyautoattack", "AutoAttack", False),
    ("onnxruntime", "export to ONNX", False),
    ("datasets", "data of Hugging Face", False),
)
DATA = {
    "cifar10": ("cifar-10-batches-py",),
    "cifar100": ("cifar-100-python",),
    "svhn": ("train_32x32.mat", "test_32x32.mat"),
    "tiny-imagenet": ("tiny-imagenet-200",),
}
LITTLE_DISK = 2 * 1024**3


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        what: name of the thing.
        state: ``"ok"``, ``"note"`` (something is left out) or ``"bad"`` (training will fail, or waste most of the
            machine).
        detail: what was found, and what to do.
    """

    what: str
    state: State
    detail: str


def examine(data_root: Path, out: Path, kernels: Sequence[engm.SelfTestReport] = ()) -> list[Finding]:
    """Looks at everything; only a file is written to ``out`` (or to what exists of that path) and removed again.

    Args:
        data_root: where named data sets would lie.
        out: where runs would be written.
        kernels: what :func:`try_kernels` found.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        _build,
        _threads,
        *(partial(_kernels, report) for report in kernels),
        _gpu,
        _packages,
        lambda: _data(data_root),
        lambda: _disk(out),
    ]
    return [finding for check in checks for finding in check()]


def _build() -> Iterator[Finding]:
    info = engm.build_info()
    yield Finding("engm", "ok", f"{info['engm']}, built for torch {info.get('torch_built', info['torch'])}")
    yield Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")


def _threads() -> Iterator[Finding]:
    """Whether the CPU operators use the threads that torch has."""
    compiled = engm.build_info()["cpu_parallel"]
    described = re.search(r"^ATen parallel backend: (.*)$", torch.__config__.parallel_info(), re.MULTILINE)
    backend = described.group(1) if described else "unknown"
    if compiled == "none (serial)" and backend != "unknown":
        yield Finding(
            "threads",
            "bad",
            f"THE CPU OPERATORS RUN ON ONE THREAD, while torch uses {torch.get_num_threads()} ({backend}): engm was "
            "compiled without torch's parallel backend (-fopenmp); rebuild with pip install -e .",
        )
    else:
        yield Finding("threads", "ok", f"CPU operators: {compiled}; torch: {backend}")


def try_kernels() -> list[engm.SelfTestReport]:
    """Tries all kernels of all devices that this build has any for."""
    devices = ["cpu"]
    if torch.cuda.is_available() and engm.build_info()["cuda"]:
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [engm.self_test(device) for device in devices]


def _kernels(report: engm.SelfTestReport) -> Iterator[Finding]:
    """What the trials of a device's kernels said."""
    failed = dict.fromkeys(f"{trial.kernel} in {trial.precision}" for trial in report.failed)
    if not failed:
        yield Finding("kernels", "ok", f"{report.device}: {len(report.trials)} trials agree with torch in float64")
        return
    remedy = (
        "rebuild with pip install -e . and report it with the table below"
        if report.device == "cpu"
        else "torch computes in their place, slower and right; report it with the table below"
    )
    yield Finding("kernels", "bad", f"{report.device}: WRONG: {', '.join(failed)}: {remedy}")


def _gpu() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "torch sees none: look at nvidia-smi"
        yield Finding("GPU", "note", f"none: {why}; training will run on the CPU")
        return
    compiled = str(engm.build_info().get("cuda_architectures") or "")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        detail = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        )
        if not compiled:
            yield Finding(f"GPU {index}", "bad", f"{detail}; engm was built without CUDA: rebuild with FORCE_CUDA=1")
        else:
            yield Finding(f"GPU {index}", "ok", f"{detail}; kernels for {compiled}")


def _packages() -> Iterator[Finding]:
    for name, purpose, needed in PACKAGES:
        try:
            found = version(name)
        except PackageNotFoundError:
            remedy = "pip install 'engm[recipes]'" if needed else "optional"
            yield Finding(name, "bad" if needed else "note", f"not installed ({purpose}): {remedy}")
            continue
        module = {"scikit-learn": "sklearn", "tomli-w": "tomli_w"}.get(name, name)
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a broken package does on import is what is being asked here
            yield Finding(name, "bad", f"{found} does not import: {error}; does it fit torch {torch.__version__}?")
        else:
            yield Finding(name, "ok", f"{found} ({purpose})")


def _data(root: Path) -> Iterator[Finding]:
    for name, files in DATA.items():
        missing = [file for file in files if not (root / file).exists()]
        if missing:
            how = how_to_get(root) if name == "tiny-imagenet" else "engm train --download fetches it"
            yield Finding(name, "note", f"not under {root} ({', '.join(missing)} missing): {how}")
        else:
            yield Finding(name, "ok", f"under {root}")


def _disk(out: Path) -> Iterator[Finding]:
    place = out.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        yield Finding("output", "bad", f"{place} cannot be written ({error.strerror}): choose another --out")
        return
    free = shutil.disk_usage(place).free
    yield Finding(
        "output",
        "ok" if free >= LITTLE_DISK else "note",
        f"{place} can be written, {free / 1e9:.1f} GB free"
        + ("" if free >= LITTLE_DISK else ": little for checkpoints"),
    )
