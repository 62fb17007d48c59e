"""The result file: one JSON, filled case by case, that survives failing cases, a lost device and a killed process."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import engm
from engm.recipes.storage.atomic_files import write_text_atomic

ROOT = Path(__file__).resolve().parents[2]
SAVE_EVERY = 2.0  # seconds


class DeviceLostError(RuntimeError):
    """The CUDA context is dead: nothing more can run in this process."""


class Absent(Exception):  # noqa: N818 (it is no error if a peer is not installed)
    """A case that cannot be measured here, and why."""


class Record:
    """``DIR/gpu.json``, with one list of cases for every stage.

    Args:
        out: the directory; made if need be. An earlier file there keeps the stages that are not run again.
        resume: keep what an earlier process has measured of a stage, and pass over it.
    """

    def __init__(self, out: Path, *, resume: bool = False) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.path, self._running = out, out / "gpu.json", out / "running.txt"
        self.resume = resume
        self.document: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {"stages": {}}
        self._saved = time.monotonic()

    def save(self) -> None:
        """Writes the file whole or not at all."""
        write_text_atomic(self.path, json.dumps(self.document, indent=1) + "\n")
        self._saved = time.monotonic()

    def stage(self, name: str, seconds: float, device: torch.device) -> Stage:
        """A stage that stops taking new cases after ``seconds``."""
        stages = self.document["stages"]
        if not (self.resume and name in stages):
            stages[name] = {"cases": [], "seconds": 0.0, "passed over": []}
            self._running.unlink(missing_ok=True)
        stage = Stage(self, name, stages[name], seconds, device)
        if self._running.exists():  # an earlier process did not come back from this case
            stage.add({"case": self._running.read_text(), "error": "did not finish: hung, or killed with its process"})
            self._running.unlink()
        return stage


class Stage:
    """The cases of one stage, and how much of its time is left."""

    def __init__(self, record: Record, name: str, entry: dict[str, Any], seconds: float, device: torch.device) -> None:
        self.record, self.name, self.entry, self.device = record, name, entry, device
        self.seconds, self._before, self._start = seconds, entry["seconds"], time.monotonic()
        self._known = {case["case"] for case in entry["cases"]}

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - self._before - (time.monotonic() - self._start)

    def add(self, case: dict[str, Any]) -> None:
        """Adds a finished case."""
        self._known.add(case["case"])
        self.entry["cases"].append(case)
        self.entry["seconds"] = round(self._before + time.monotonic() - self._start, 2)

    def case(self, label: str, work: Callable[[], dict[str, Any] | None], **facts: Any) -> dict[str, Any] | None:
        """Runs ``work`` and records the figures it returns together with ``facts``.

        What fails is recorded with its traceback, what is absent with the reason; nothing is raised but a lost device.

        Returns:
            The figures, or None where there are none.
        """
        if label in self._known:
            return next((c for c in self.entry["cases"] if c["case"] == label and "error" not in c), None)
        if self.left <= 0:
            self.entry["passed over"].append(label)
            return None
        self.record._running.write_text(label)
        entry: dict[str, Any] = {"case": label, **facts}
        figures: dict[str, Any] | None = None
        try:
            figures = work() or {}
            entry.update(figures)
        except Absent as reason:
            entry["absent"] = str(reason)
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {str(error)[:2000]}"
            entry["traceback"] = traceback.format_exc(limit=-8)[-4000:]
            print(f"    {label}: {entry['error'].splitlines()[0][:160]}", flush=True)
        self.add(entry)
        self.entry.pop("in progress", None)
        self.record._running.unlink(missing_ok=True)
        if "error" in entry:
            self._look_after_failure()
        if time.monotonic() - self.record._saved > SAVE_EVERY:
            self.record.save()
        return figures

    def _look_after_failure(self) -> None:
        gc.collect()
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            self.record.save()
            raise DeviceLostError(str(error).splitlines()[0]) from error

    def partly(self, label: str, figures: dict[str, Any]) -> None:
        """Saves what a long case knows so far, in case it never ends."""
        self.entry["in progress"] = {"case": label, **figures}
        self.record.save()

    @contextmanager
    def running(self) -> Iterator[Stage]:
        """The stage at work; its cases are saved whatever happens."""
        print(f"== {self.name} ({self.seconds:.0f} s at most)", flush=True)
        self.entry["passed over"] = []
        try:
            yield self
        finally:
            self.entry["seconds"] = round(self._before + time.monotonic() - self._start, 2)
            self.record.save()


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on and with."""
    facts: dict[str, Any] = {
        "device": str(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "engm": {key: value for key, value in engm.build_info().items() if key != "compiler"},
        "commit": _answer("git", "-C", str(ROOT), "rev-parse", "HEAD") or os.environ.get("ENGM_COMMIT"),
        "processors": os.cpu_count(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory gigabytes": round(properties.total_memory / 1e9, 1),
            "cudnn": torch.backends.cudnn.version(),
            "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": _answer("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"),
        }
    return facts


def _answer(*command: str) -> str | None:
    """The first line that a command prints; None if it prints none or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [None])[0]
