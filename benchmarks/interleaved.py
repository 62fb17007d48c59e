"""Interleaved timing: contenders take turns in one process, so that a slow minute of the machine hits all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

Step = Callable[[], object]

TURN = 0.02
"""Seconds that a turn takes the reference, at least."""


@dataclass(frozen=True)
class Timing:
    """What was measured of one contender.

    Attributes:
        seconds: median over the rounds.
        ratio: median over the rounds of its time over the reference's time in the same round.
        spread: half the interquartile range of those ratios.
        peak_bytes: peak of what a step allocated from torch's allocator, above what lived before it.
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


def compare(
    steps: Mapping[str, Step], *, reference: str, rounds: int, few: Collection[str] = (), few_rounds: int = 2
) -> dict[str, Timing]:
    """Run every step once to warm up, once for its memory, then ``rounds`` times in turn.

    A turn is one step, or as many as take the reference 20 ms: alone between steps of others, a short one would be
    timed with their code and data in the caches, as no training loop runs it. All contenders take as many in a turn.

    Args:
        steps: name to a function that does one training step.
        reference: the name that ratios are to; not one of ``few``.
        rounds: how many turns.
        few: slow contenders, which take part in the first ``few_rounds`` turns only and are warmed up once.
        few_rounds: how many turns the slow contenders take.
    """
    peaks = {}
    for name, step in steps.items():
        if name not in few:
            step()
        peaks[name] = peak_allocation(step)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    shortest = min(_time(steps[reference]) for _ in range(3))
    repeats = max(1, math.ceil(TURN / max(shortest, 1e-5)))
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name in few and turn >= few_rounds:
                continue
            seconds[name].append(_time(steps[name], repeats))
    timings = {}
    for name, measured in seconds.items():
        ratios = [own / other for own, other in zip(measured, seconds[reference], strict=False)]
        timings[name] = Timing(statistics.median(measured), statistics.median(ratios), spread_of(ratios), peaks[name])
    return timings


def _time(step: Step, repeats: int = 1) -> float:
    """Seconds a step takes, one after another."""
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize()
    return (time.perf_counter() - start) / repeats


def spread_of(values: list[float]) -> float:
    """Half the interquartile range; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def runnable(makers: Mapping[str, Callable[[], Step]]) -> tuple[dict[str, Step], dict[str, str]]:
    """Make every contender and let it do one step; returns the steps that work, and for the others the reason."""
    steps, reasons = {}, {}
    for name, maker in makers.items():
        try:
            step = maker()
            step()
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            reasons[name] = f"{type(error).__name__}: {first[0][:300]}"
        else:
            steps[name] = step
    return steps, reasons


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_allocation(step: Step) -> int:
    """Peak of the bytes that ``step`` holds at once: torch's profiler on the CPU, on a GPU its caching allocator.

    Scratch that libraries take from elsewhere (oneDNN, MKL, the per-thread buffers of engm's kernels) is not counted.
    """
    if torch.cuda.is_available() and torch.cuda.memory_allocated():  # a step on the GPU has tensors there
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    result = profile.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in result.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak
