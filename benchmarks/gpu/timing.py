"""Time and memory of calls, by CUDA events: single operators with a cold L2, whole steps in turn."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from interleaved import spread_of
from torch import Tensor

Call = Callable[[], object]

PRECISIONS = {  # operand type, whether TF32 is allowed
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "fp64": (torch.float64, False),
}
CASE_SECONDS = 8.0
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """The operand type of a precision, with torch's TF32 switches set for it."""
    dtype, allowed = PRECISIONS[name]
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield dtype
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@dataclass
class Bench:
    """Where to measure, and how thoroughly.

    Attributes:
        device: "cuda", or "cpu" for rehearsals.
        tiny: shapes and repetitions that only show that everything runs.
        faked: the device is the CPU under ``faked_cuda()``, so that the steps of a GPU are taken.
    """

    device: torch.device
    tiny: bool
    faked: bool = False

    def __post_init__(self) -> None:
        # Four times the L2 of an H100; zeroing it takes longer than the host needs for the launches that follow.
        size = 1 if self.faked else 256 << 20
        self._flush = torch.empty(size, dtype=torch.int8, device=self.device) if self.cuda else None

    @property
    def cuda(self) -> bool:
        """Whether there are events and an allocator to ask, were they only faked ones."""
        return self.faked or self.real_cuda

    @property
    def real_cuda(self) -> bool:
        """Whether there are streams, graphs and kernels of CUDA."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, memory: str = "nchw") -> Tensor:
        """A random operand; zeros would run faster."""
        t = torch.randn(*shape, device=self.device).to(dtype)
        return t.contiguous(memory_format=FORMATS[memory]) if t.dim() == 4 else t

    def elapsed(self, call: Call) -> float:
        """Milliseconds of one call on the device's clock; the host waits for its end."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        torch.cuda.synchronize()
        return start_event.elapsed_time(end_event)

    def milliseconds(self, call: Call, seconds: float = 0.05) -> dict[str, float]:
        """Median and spread of single calls with a cold L2, for about ``seconds``."""
        if self.tiny and not self.faked:
            return {"ms": round(self.elapsed(call), 4), "spread": 0.0, "repeats": 1}
        for _ in range(2):  # the first calls load modules, let cuDNN choose its algorithm, and allocate workspaces
            call()
        self.synchronize()
        once = self.elapsed(call)
        repeats = 2 if self.tiny else int(min(60, max(5, 1e3 * seconds / max(once + 0.15, 1e-3))))
        if not self.cuda:
            return _summary([self.elapsed(call) for _ in range(repeats)])
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            self._flush.zero_()  # type: ignore[union-attr]
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return _summary([start.elapsed_time(end) for start, end in events])

    def peak_bytes(self, call: Call) -> int | None:
        """The most that ``call`` allocates at once above what lives before it; None on the CPU."""
        if not self.cuda:
            call()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def compare(
        self, steps: Mapping[str, Call], reference: str, *, rounds: int, inner: int = 3, few: tuple[str, ...] = ()
    ) -> dict[str, dict[str, Any]]:
        """Whole steps in turn, as ratios to ``reference`` in the same round.

        Args:
            steps: name to a function that does one training step.
            reference: the name that ratios are to.
            rounds: how many turns, fewer (at least 3) where they would take longer than ``CASE_SECONDS``.
            inner: steps in a row that are timed as one, so that the host may run ahead as it does in training.
            few: contenders so slow that one step in one round has to do.

        Returns:
            By name: milliseconds a step, ratio, spread of the ratio, peak megabytes; or the error of a contender.
        """
        figures: dict[str, dict[str, Any]] = {}
        alive, warm = {}, {}
        for name, step in steps.items():
            try:
                for _ in range(1 if self.tiny or name in few else 3):
                    step()
                figures[name] = {"peak megabytes": _megabytes(self.peak_bytes(step))}
                alive[name] = step
                warm[name] = 0.0 if self.tiny or name in few else self.elapsed(step)
            except Exception as error:
                if name == reference or _context_is_dead(self):
                    raise
                first = str(error).splitlines()[0][:300] if str(error) else ""
                figures[name] = {
                    "error": f"{type(error).__name__}: {first}",
                    "traceback": traceback.format_exc(limit=-6)[-2500:],
                }
        inner = 1 if self.tiny or warm[reference] > 60 else inner
        rounds = (
            1 if self.tiny else int(max(3, min(rounds, 1e3 * CASE_SECONDS / max(1e-3, inner * sum(warm.values())))))
        )
        times: dict[str, list[float]] = {name: [] for name in alive}
        pairs: dict[str, list[float]] = {name: [] for name in alive}
        names = list(alive)
        for turn in range(rounds):
            shift = turn % len(names)
            now = {}
            for name in names[shift:] + names[:shift]:
                if name in few and turn:
                    continue
                count = 1 if name in few else inner
                self.synchronize()
                now[name] = self.elapsed(lambda step=alive[name], count=count: [step() for _ in range(count)]) / count
            for name, value in now.items():
                times[name].append(value)
                pairs[name].append(value / now[reference])
        for name in alive:
            spread = spread_of(pairs[name])
            figures[name] |= {
                "ms": round(statistics.median(times[name]), 4),
                "ratio": round(statistics.median(pairs[name]), 4),
                "spread": round(spread, 4),
            }
        return figures


def _summary(times: list[float]) -> dict[str, float]:
    return {
        "ms": round(statistics.median(times), 5),
        "spread": round(spread_of(times), 5),
        "repeats": len(times),
    }


def _megabytes(count: int | None) -> float | None:
    return None if count is None else round(count / 1e6, 2)


def _context_is_dead(bench: Bench) -> bool:
    try:
        bench.synchronize()
        if bench.cuda:
            torch.cuda.empty_cache()
    except Exception:
        return True
    return False
