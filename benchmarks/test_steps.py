"""Cost of exact clipping: whole training steps, interleaved with plain SGD (or MSGD) in one run.

make bench                         all of it, and benchmarks/results/cpu/steps.json
ENGM_BENCH_ROUNDS=3 make bench     quicker and noisier
"""

from __future__ import annotations

import os

import pytest
import workloads
from interleaved import Timing, compare

ROUNDS = int(os.environ.get("ENGM_BENCH_ROUNDS", "7"))
CALIBRATE_EVERY = 50  # the default: one step in fifty pays for a calibration

PLAIN = [("resnet18", 16), ("resnet18", 32), ("vgg", 32)]


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
    if norm == "group":
        steps["opacus ghost"] = workloads.opacus_ghost(net, x, y)
    timings = compare(steps, reference="sgd", rounds=ROUNDS)
    if width == 16:  # slow: the ratio of naive ENGM to SGD from two rounds
        timings |= {
            "naive engm": compare(
                {"sgd": steps["sgd"], "naive engm": workloads.naive_engm(net, x, y)}, reference="sgd", rounds=2
            )["naive engm"]
        }
    report(benchmark, record, timings, "sgd", steps["sgd"])
    assert timings["engm"].ratio > 1.0  # it does strictly more work


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_pgd_step(benchmark, record, norm: str) -> None:
    """One adversarial training step with PGD-10, ResNet-18 of width 16, n = 64, norms borrowed and from an own pass."""
    net, (x, y) = workloads.network("resnet18", 16, norm), workloads.batch(64)
    steps = {"msgd": workloads.pgd_step(net, x, y, "msgd", borrowed=False)}
    for method in ("engm", "aengm", "nengm"):
        for borrowed in (True, False):
            label = f"{method} ({'borrowed' if borrowed else 'own pass'})"
            steps[label] = workloads.pgd_step(net, x, y, method, borrowed=borrowed)
    timings = compare(steps, reference="msgd", rounds=max(3, ROUNDS - 2))
    if norm == "batch":
        plain = {
            "engm (own pass)": workloads.engm_step(net, x, y, "engm"),
            "calibrating": workloads.calibrating(net, x, y),
        }
        plain_timings = compare(plain, reference="engm (own pass)", rounds=2)
        extra = plain_timings["calibrating"].seconds - plain_timings["engm (own pass)"].seconds
        for label in ("engm (borrowed)", "engm (own pass)"):
            timings[f"{label}, calibration included"] = amortised(timings[label], extra, timings["msgd"])
    timings |= {
        "naive engm": compare(
            {"msgd": steps["msgd"], "naive engm": workloads.pgd_naive(net, x, y)}, reference="msgd", rounds=1
        )["naive engm"]
    }
    report(benchmark, record, timings, "msgd", steps["msgd"])
    assert timings["engm (borrowed)"].ratio < timings["naive engm"].ratio


def amortised(timing: Timing, extra_seconds: float, reference: Timing) -> Timing:
    """The mean step of a run in which one step in fifty takes ``extra_seconds`` more."""
    extra = extra_seconds / CALIBRATE_EVERY
    return Timing(timing.seconds + extra, timing.ratio + extra / reference.seconds, timing.spread, timing.peak_bytes)
