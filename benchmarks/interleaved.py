"""Interleaved timing: contenders take turns in one process, so that a slow minute of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """One contender.

    Attributes:
        seconds: median over the rounds.
        ratio: median over the rounds of its time over the reference's time in the same round.
        spread: half the interquartile range of those ratios.
        peak_bytes: peak of what a step allocated from torch's CPU allocator, above what lived before it.
    """

    seconds: float
    ratio: float
    spread: float
    peak_bytes: int

    def as_json(self) -> dict[str, float]:
        """Plain numbers, rounded to what the machine can tell."""
        return {
            "seconds": round(self.seconds, 5),
            "ratio": round(self.ratio, 4),
            "spread": round(self.spread, 4),
            "peak_megabytes": round(self.peak_bytes / 1e6, 2),
        }


def compare(steps: Mapping[str, Callable[[], object]], *, reference: str, rounds: int) -> dict[str, Timing]:
    """Run every step once to warm up, once for its memory, then ``rounds`` times in turn.

    Args:
        steps: name to a function that does one training step.
        reference: the name that ratios are to.
        rounds: how many turns.
    """
    peaks = {}
    for name, step in steps.items():
        step()
        peaks[name] = peak_allocation(step)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    timings = {}
    for name, measured in seconds.items():
        ratios = [own / other for own, other in zip(measured, seconds[reference], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [0.0, 0.0, 0.0]
        timings[name] = Timing(
            statistics.median(measured), statistics.median(ratios), (quartiles[2] - quartiles[0]) / 2, peaks[name]
        )
    return timings


def peak_allocation(step: Callable[[], object]) -> int:
    """Peak of the bytes that ``step`` holds at once, as torch's profiler sees allocations on the CPU.

    Scratch that libraries take from elsewhere (oneDNN, MKL, the per-thread buffers of engm's kernels) is not in it.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    result = profile.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in result.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak
