"""Collects the figures of a benchmark session into one JSON with the machine and versions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import output
import pytest
import torch

import engm

THREADS = int(os.environ.get("ENGM_BENCH_THREADS", "2"))
OUT = Path(os.environ.get("ENGM_BENCH_OUT", Path(__file__).parent / "results" / "cpu" / "steps.json"))
_FIGURES: dict[str, object] = {}


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[dict[str, object]], None]:
    """A function that takes the figures of the test."""
    return lambda figures: _FIGURES.update({request.node.name: figures})


def pytest_sessionfinish() -> None:
    """Write what was recorded."""
    if not _FIGURES:
        return
    OUT.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(OUT.read_text())["benchmarks"] if OUT.exists() else {}
    document = {
        "machine": output.processor(),
        "threads": THREADS,
        "torch": torch.__version__,
        "engm": engm.build_info(),
        "benchmarks": {**earlier, **_FIGURES},
    }
    OUT.write_text(json.dumps(document, indent=1) + "\n")
