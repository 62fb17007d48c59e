"""Cost of exact clipping: plain training steps, interleaved with SGD in one run; table1.py has the adversarial ones.

make bench                         all of it, and benchmarks/results/cpu/steps.json
ENGM_BENCH_ROUNDS=3 make bench     quicker and noisier
"""

from __future__ import annotations

import os

import pytest
import workloads
from interleaved import Timing, compare

ROUNDS = int(os.environ.get("ENGM_BENCH_ROUNDS", "7"))

PLAIN = [("resnet18", 16), ("resnet18", 32), ("resnet18", 64), ("vgg", 32)]


def report(benchmark, record, timings: dict[str, Timing], reference: str, step) -> None:
    """Put the ratios into pytest-benchmark's record and the session's JSON, and let it time the reference."""
    figures = {name: timing.as_json() for name, timing in timings.items()}
    benchmark.extra_info.update({"reference": reference, "contenders": figures})
    record({"reference": reference, "contenders": figures})
    benchmark.pedantic(step, rounds=1)


@pytest.mark.parametrize(("name", "width"), PLAIN)
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_plain_step(benchmark, record, name: str, width: int, norm: str) -> None:
    """One training step, n = 64, 32x32 images: ENGM, A-ENGM, N-ENGM, naive ENGM and Opacus ghost against SGD."""
    net, (x, y) = workloads.network(name, width, norm), workloads.batch(64)
    steps = {
        "sgd": workloads.plain_sgd(net, x, y),
        "engm": workloads.engm_step(net, x, y, "engm"),
        "aengm": workloads.engm_step(net, x, y, "aengm"),
        "nengm": workloads.engm_step(net, x, y, "nengm"),
    }
    if norm == "group" and width < 64:  # unfolds every layer: several gigabytes at width 64
        steps["opacus ghost"] = workloads.opacus_ghost(net, x, y)
    timings = compare(steps, reference="sgd", rounds=ROUNDS)
    if width == 16:  # naive ENGM is slow: two rounds have to do for its ratio
        timings |= {
            "naive engm": compare(
                {"sgd": steps["sgd"], "naive engm": workloads.naive_engm(net, x, y)}, reference="sgd", rounds=2
            )["naive engm"]
        }
    report(benchmark, record, timings, "sgd", steps["sgd"])
    assert timings["engm"].ratio > 0.9  # ENGM does strictly more work: far less time would mean that some is left out
