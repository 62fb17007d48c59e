"""Every operator with a parallel loop of its own on a problem that is worth two threads, and who does the work.

As a script, with ``OMP_NUM_THREADS=2``, this file prints what each thread of the process contributed.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import engm
from engm import ops, reference

GEOMETRY = ([3, 3], [1, 1], [1, 1], [1, 1])
LEAST_SECONDS = 0.05  # of processor time that each operator is given


@dataclass(frozen=True)
class Case:
    """An operator on drawn operands.

    Attributes:
        run: calls the operator.
        expected: calls its reference with the same operands in float64.
        same_on_one_thread: whether one thread has to give the same bits; not where few examples are split by threads.
    """

    run: Callable[[], Tensor | tuple[Tensor, ...]]
    expected: Callable[[], Tensor | tuple[Tensor, ...]]
    same_on_one_thread: bool = True


def _convolution(n: int, channels: int, side: int, form: str, groups: int = 1, *, corrected: bool = False) -> Case:
    x, gy = torch.randn(n, channels, side, side), torch.randn(n, channels, side, side)
    correction: dict[str, Tensor] = {}
    if corrected:
        weight = (channels, channels // groups, 3, 3)
        correction = {
            "shift": torch.randn(n, channels),
            "patch_mean": torch.randn(channels, 3, 3),
            "scale": torch.randn(n, channels),
            "correlation": torch.randn(weight),
        }
    wide = {name: value.double() for name, value in correction.items()}
    return Case(
        lambda: ops.conv_norm_sq(x, gy, *GEOMETRY, groups, form, **correction),
        lambda: reference.conv_norm_sq(x.double(), gy.double(), *GEOMETRY, groups, **wide),
        same_on_one_thread=n >= 4,
    )


def _conv_grads() -> Case:
    x, gy = torch.randn(8, 32, 16, 16), torch.randn(8, 32, 16, 16)
    return Case(
        lambda: ops.conv_grads(x, gy, *GEOMETRY), lambda: reference.conv_grads(x.double(), gy.double(), *GEOMETRY)
    )


def _linear(n: int, positions: int, form: str) -> Case:
    a, b = torch.randn(n, positions, 256), torch.randn(n, positions, 192)
    return Case(lambda: ops.linear_norm_sq(a, b, form), lambda: reference.linear_norm_sq(a.double(), b.double()))


def _affine(shape: tuple[int, int, int], channel_dim: int) -> Case:
    x, gy = torch.randn(shape), torch.randn(shape)
    varying = [size if dim == channel_dim else 1 for dim, size in enumerate(shape)]
    mean, rstd = torch.randn(varying), torch.rand(varying) + 0.5
    return Case(
        lambda: ops.affine_norm_sq(x, gy, mean, rstd, channel_dim),
        lambda: reference.affine_norm_sq(x.double(), gy.double(), mean.double(), rstd.double(), channel_dim),
    )


def _embedding() -> Case:
    indices, gy = torch.randint(0, 50, (8, 256)), torch.randn(8, 256, 64)
    return Case(lambda: ops.embedding_norm_sq(indices, gy), lambda: reference.embedding_norm_sq(indices, gy.double()))


def _clip() -> Case:
    squares = torch.rand(40, 4096)
    return Case(lambda: ops.clip_weights(squares, 4.0), lambda: reference.clip_weights(squares.double(), 4.0))


def _factors(*, channels_last: bool) -> Case:
    outputs, channels, rows = torch.randn(16, 64, 400), torch.rand(3, 64), torch.randn(2, 16, 64)
    if channels_last:
        outputs = outputs.transpose(1, 2).contiguous().transpose(1, 2)
    return Case(
        lambda: ops.correction_factors(outputs, *channels, *rows),
        lambda: reference.correction_factors(*(t.double() for t in (outputs, *channels, *rows))),
    )


def _recurrence(kind: str, gates: int) -> Case:
    inputs, hidden, size = torch.randn(512, 8, 16), torch.randn(512, 48), 48
    state = [hidden, hidden + 1] if kind == "LSTM" else [hidden]
    arguments = (torch.randn(gates * size, 16), torch.randn(gates * size, size) / 7, None, None, None)
    return Case(
        lambda: ops.recurrence(kind, inputs, *arguments, state)[0],
        lambda: reference.recurrence(
            kind, inputs.double(), *(t if t is None else t.double() for t in arguments), [s.double() for s in state]
        )[0],
        same_on_one_thread=False,  # as ATen's products
    )


def _patch_mean(memory_format: torch.memory_format) -> Case:
    x = torch.randn(32, 64, 16, 16).to(memory_format=memory_format)
    return Case(lambda: ops.patch_mean(x, *GEOMETRY), lambda: reference.patch_mean(x.double(), *GEOMETRY))


CASES: dict[str, Callable[[], Case]] = {
    "convolution, direct": lambda: _convolution(8, 32, 16, "direct"),
    "convolution of one example, direct": lambda: _convolution(1, 96, 32, "direct"),
    "convolution, corrected": lambda: _convolution(6, 64, 8, "direct", corrected=True),
    "convolution, few channels in a group": lambda: _convolution(8, 64, 16, "direct", 16),
    "convolution, depthwise": lambda: _convolution(8, 64, 16, "direct", 64),
    "convolution, gradients kept": _conv_grads,
    "convolution, Gram": lambda: _convolution(8, 64, 8, "gram"),
    "convolution of one example in groups, Gram": lambda: _convolution(1, 256, 8, "gram", 4),
    "linear, direct": lambda: _linear(8, 64, "direct"),
    "linear, Gram": lambda: _linear(8, 32, "gram"),
    "linear, one position": lambda: _linear(512, 1, "auto"),
    "affine, positions dense": lambda: _affine((8, 64, 1024), 1),
    "affine, channels dense": lambda: _affine((32, 128, 384), 2),
    "affine of one example, channels dense": lambda: _affine((1, 2048, 512), 2),
    "affine of single positions": lambda: _affine((256, 1, 512), 2),
    "correction, positions dense": lambda: _factors(channels_last=False),
    "correction, channels dense": lambda: _factors(channels_last=True),
    "patch mean, channels first": lambda: _patch_mean(torch.contiguous_format),
    "patch mean, channels last": lambda: _patch_mean(torch.channels_last),
    "embedding": _embedding,
    "recurrence of an LSTM": lambda: _recurrence("LSTM", 4),
    "recurrence of a GRU": lambda: _recurrence("GRU", 3),
    "clip weights": _clip,
}


def processor_seconds() -> dict[int, float]:
    """Processor time of every thread of this process, from its own clock: other processes do not enter."""
    seconds = {}
    for task in Path("/proc/self/task").iterdir():
        thread = int(task.name)
        try:
            seconds[thread] = time.clock_gettime((~thread << 3) | 6)  # CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED
        except OSError:  # the thread has ended
            continue
    return seconds


def shares(run: Callable[[], object]) -> list[float]:
    """Each thread's share of the processor time of some calls, the largest first."""
    run()  # the threads are there, and the first call's memory
    before, stop = processor_seconds(), time.process_time() + LEAST_SECONDS
    while time.process_time() < stop:
        run()
    spent = {thread: now - before.get(thread, 0.0) for thread, now in processor_seconds().items()}
    return sorted((value / sum(spent.values()) for value in spent.values()), reverse=True)


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries that are loaded into this process."""
    mapped = re.findall(r"(/\S*/lib(?:gomp|omp|iomp5)\b\S*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return sorted(set(mapped))


def main() -> None:
    """Prints the shares of every case and the OpenMP runtimes, as JSON."""
    torch.manual_seed(0)
    found = {name: shares(case().run) for name, case in CASES.items()}
    document = {"shares": found, "runtimes": openmp_runtimes(), "backend": engm.build_info().get("cpu_parallel")}
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
