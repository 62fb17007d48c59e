"""What the hardware gives: matrix products in every precision by cuBLAS, a copy, a launch. Later stages refer to it."""

from __future__ import annotations

from typing import Any

import torch

from .record import Record, Stage
from .timing import Bench, precision


def run(bench: Bench, stage: Stage, _: Any) -> None:
    """Measures every ceiling, a case each."""
    for name in ("tf32", "bf16", "fp16", "fp32", "fp64"):
        stage.case(f"matmul {name}", lambda name=name: _matmul(bench, name), kind="matmul", precision=name)
    stage.case("copy", lambda: _copy(bench), kind="copy")
    stage.case("launch", lambda: _launch(bench), kind="launch")


def _matmul(bench: Bench, name: str) -> dict[str, Any]:
    size = 64 if bench.tiny else 8192 if name in ("tf32", "bf16", "fp16") else 4096
    with precision(name) as dtype:
        a, b = bench.randn(size, size, dtype=dtype), bench.randn(size, size, dtype=dtype)
        time = bench.milliseconds(lambda: a @ b, 0.4)
    return {**time, "size": size, "tflops": round(2e-9 * size**3 / time["ms"], 2)}


def _copy(bench: Bench) -> dict[str, Any]:
    count = (1 << 16) if bench.tiny else (1 << 30)
    source = bench.randn(count)
    target = torch.empty_like(source)
    time = bench.milliseconds(lambda: target.copy_(source), 0.3)
    return {**time, "gigabytes_per_second": round(8e-6 * count / time["ms"], 1)}


def _launch(bench: Bench) -> dict[str, Any]:
    """A kernel that does next to nothing: what no operator's time can be below here."""
    one = bench.randn(1)
    return bench.milliseconds(lambda: one.add_(1.0), 0.05)


def measured(record: Record) -> dict[str, float]:
    """TFLOP/s by precision and GB/s as ``"copy"``, as far as this or an earlier run has them."""
    cases = record.document["stages"].get("ceilings", {}).get("cases", [])
    known = {case["precision"]: case["tflops"] for case in cases if "tflops" in case}
    copies = [case["gigabytes_per_second"] for case in cases if "gigabytes_per_second" in case]
    return known | ({"copy": copies[-1]} if copies else {})
