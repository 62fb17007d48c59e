"""How the cost model's constants are measured: both forms of the norm are timed on a grid of layers, and fitted.

The fit minimises relative errors of the predicted times on two thirds of the layers. The table that comes out is taken
if it loses no more time by wrong picks than the table in use, on all layers and on the third that the fit did not see.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from .._C import build_info, conv_cost, cost_table, cost_table_source, linear_cost
from ..torch_internals import keep_device_busy
from .table import ANY, Constants, apply, cache_path, device_text, processor_name, save

Form = Literal["direct", "gram"]
FORMS: tuple[Form, Form] = ("direct", "gram")

# A form's time is the sum of its parts, as the compiled cost model counts them, each times its constant. The first part
# of the direct form are its FLOPs, whose cost is the unit; these are the constants of the others.
DIRECT = ("tile_steps", "direct_element", "direct_last_element")
GRAM = (
    *("gram_flop", "gram_element", "gram_last_element", "tap_flop", "gram_block"),
    *("product_flop", "product_element", "product_example"),  # linear layers on CUDA, which have none of the others
)

MOST_ROUNDS = 30
BUSY_CYCLES = 300_000  # a GPU is kept busy before a timed call, so that the call's launch is not in the measured time


@dataclass(frozen=True)
class Layer:
    """A layer to time: linear if ``kernel`` is 0, else a convolution with a square kernel on a square map.

    Attributes:
        channels: features or channels of the input.
        rows: features or channels of the output.
        side: positions of a linear layer; side of a convolution's input map.
        kernel: side of the kernel.
        stride: of the convolution.
        channels_last: whether the channels of its maps lie side by side in memory.
    """

    channels: int
    rows: int
    side: int
    kernel: int = 0
    stride: int = 1
    channels_last: bool = False

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], list[int], int]:
        """Kernel size, stride, padding, dilation and groups of the convolution, as the operators take them."""
        return [self.kernel] * 2, [self.stride] * 2, [self.kernel // 2] * 2, [1, 1], 1

    @property
    def output_side(self) -> int:
        """Side of the output map."""
        return (self.side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    def cost(self, device: str, precision: str) -> Any:
        """What the compiled cost model says of the layer's norm."""
        if self.kernel == 0:
            return linear_cost(self.side, self.channels, self.rows, device, precision)
        sizes = [self.side] * 2, [self.output_side] * 2
        return conv_cost(self.channels, self.rows, *self.geometry, *sizes, device, precision, self.channels_last)

    def call(self, n: int, device: str, dtype: torch.dtype) -> Callable[[Form], Tensor]:
        """A function that computes the norms of ``n`` random examples in a given form."""
        if self.kernel == 0:
            a = torch.randn(n, self.side, self.channels, device=device).to(dtype)
            b = torch.randn(n, self.side, self.rows, device=device).to(dtype)
            return lambda form: ops.linear_norm_sq(a, b, form)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x = torch.randn(n, self.channels, self.side, self.side, device=device).to(dtype, memory_format=layout)
        gy = torch.randn(n, self.rows, self.output_side, self.output_side, device=device).to(
            dtype, memory_format=layout
        )
        return lambda form: ops.conv_norm_sq(x, gy, *self.geometry, form=form)


_ROWS = (
    *(Layer(64, 64, t) for t in (2, 8, 16, 32, 64, 128)),
    *(Layer(256, 256, t) for t in (4, 16, 32, 64, 128, 196)),
    *(Layer(768, 192, t) for t in (8, 32, 64, 128)),
    *(Layer(512, 512, t) for t in (16, 64, 128, 256)),
)
_MAPS = (
    *(Layer(16, 16, side, 3) for side in (4, 8, 16)),
    *(Layer(32, 32, side, 3) for side in (4, 8, 16)),
    *(Layer(64, 64, side, 3) for side in (4, 8, 12, 16)),
    *(Layer(128, 128, side, 3) for side in (4, 8, 12, 16)),
    *(Layer(256, 256, side, 3) for side in (4, 8, 16)),
    *(Layer(c, 2 * c, 16, 3, 2) for c in (32, 64, 128)),
    *(Layer(256, 64, side, 1) for side in (4, 8, 14)),
    Layer(32, 64, 8, 5),
    Layer(3, 32, 16, 3),
    Layer(512, 512, 4, 3),
)
# Maps of either layout are neighbours, so that neither is left out of the fit.
LAYERS: tuple[Layer, ...] = (
    *_ROWS,
    *(replace(layer, channels_last=last) for layer in _MAPS for last in (False, True)),
)


@dataclass(frozen=True)
class Timing:
    """What was measured of one layer.

    Attributes:
        parts: what the compiled cost model counts, by form; the time should be their sum, each times a constant.
        seconds: measured, for one example, by form.
    """

    parts: dict[Form, list[float]]
    seconds: dict[Form, float]

    def pick(self, constants: Constants) -> Form:
        """The form that a table picks, computed as the compiled cost model does."""
        direct = _dot([1.0, *(constants[name] for name in DIRECT)], self.parts["direct"])
        return "gram" if _dot([constants[name] for name in GRAM], self.parts["gram"]) < direct else "direct"

    def regret(self, constants: Constants) -> float:
        """Time lost by the table's pick, as a share of the faster form's."""
        return self.seconds[self.pick(constants)] / min(self.seconds.values()) - 1


@dataclass(frozen=True)
class Fit:
    """How the table in use before and the fitted one after fare on the measured layers.

    Attributes:
        precision: how products are formed, ``"any"`` on a CPU.
        layers: number of layers that were timed in both forms.
        rounds: how often each layer was timed; medians count.
        right: shares of the layers for which the faster form is taken, before and after.
        regret: mean time lost by wrong picks as a share of the faster form's time, before and after.
        held_out_regret: the regret over the layers that the fit did not see, before and after.
        accepted: whether the fitted table is taken, which it is not if it loses more time than the table before.
    """

    precision: str
    layers: int
    rounds: int
    right: tuple[float, float]
    regret: tuple[float, float]
    held_out_regret: tuple[float, float]
    accepted: bool

    def __str__(self) -> str:
        before, after = zip(self.right, self.regret, self.held_out_regret, strict=True)
        return (
            f"{self.precision}: faster form taken in {after[0]:.0%} of {self.layers} layers (before: {before[0]:.0%}); "
            f"time lost by wrong picks {after[1]:.1%} (before: {before[1]:.1%}), "
            f"on layers the fit did not see {after[2]:.1%} ({before[2]:.1%}); "
            + ("taken" if self.accepted else "refused, the old table stays")
        )


@dataclass(frozen=True)
class CostTable:
    """The constants that a device's forms are chosen by.

    Attributes:
        device: ``"cpu"`` or ``"cuda:<index>"``.
        name: what the processor calls itself.
        constants: the constants by precision; the unit is the time of one FLOP of the direct form.
        source: ``"built-in"``, or the file that the table is in.
        fits: for every precision, how the choice fared before and fares after.
    """

    device: str
    name: str
    constants: dict[str, Constants]
    source: str
    fits: tuple[Fit, ...]

    @property
    def accepted(self) -> bool:
        """Whether any new table was taken."""
        return any(fit.accepted for fit in self.fits)

    def __str__(self) -> str:
        return "\n".join([f"cost table of {self.name} ({self.device}): {self.source}", *(f"  {f}" for f in self.fits)])


def tune(
    device: torch.device | str = "cpu", *, path: str | os.PathLike[str] | None = None, seconds: float = 20.0
) -> CostTable:
    """Times both forms of the norm on a grid of layers, fits a cost table to them, saves the table and chooses by it.

    Run this once a machine, while nothing else runs on it, with the number of threads of your training. Every later
    process reads the saved table when it first uses the device. A table that would lose more time than the one in use
    is refused: then nothing changes and nothing is saved.

    Args:
        device: ``"cpu"`` or a CUDA device.
        path: the JSON file; default: the file that ``ENGM_COST_TABLE`` names, else one by the processor's name in
            ``$XDG_CACHE_HOME/engm/cost`` or ``~/.cache/engm/cost``. Only the default is read again by later processes.
        seconds: time to spend; each layer is timed once at least, up to 30 times.

    Returns:
        The table in use afterwards, and how the choice by it fares; prints as a few lines.

    Raises:
        ValueError: ``device`` is neither a CPU nor a CUDA device, or ``seconds`` is not positive.
        RuntimeError: there is no such device, or no kernels were compiled for it.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"tune expects a CPU or CUDA device, got {str(device)!r}.")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("tune needs the CUDA device that it measures, and this machine has none.")
    if kind == "cuda" and not {"linear_norm_sq", "conv_norm_sq"} <= set(build_info()["cuda_kernels"]):
        raise RuntimeError(
            "tune measures compiled kernels, and this build has none of the norms for CUDA; see build_info."
        )
    text = device_text(device)
    precisions = [ANY] if kind == "cpu" else ["tf32", "float32", "bfloat16", "float16", "float64"]
    constants: dict[str, Constants] = {}
    fits = []
    for precision in precisions:
        timings, rounds = measure_layers(text, precision, seconds / len(precisions))
        before = cost_table(text, "float32" if precision == ANY else precision)
        after = fit_constants([timing for i, timing in enumerate(timings) if not is_held_out(i)])
        fits.append(_compare(precision, timings, rounds, before, after))
        constants[precision] = after if fits[-1].accepted and after else before
    if any(fit.accepted for fit in fits):
        target = Path(path) if path is not None else default_path(text)
        notes = {"threads": torch.get_num_threads()} if kind == "cpu" else {}
        save(target, text, constants, **notes, fits=[str(fit) for fit in fits])
        apply(text, constants, str(target))
    return CostTable(text, processor_name(text), constants, cost_table_source(text), tuple(fits))


def default_path(device: str) -> Path:
    """Where :func:`tune` saves the table of a device."""
    chosen = os.environ.get("ENGM_COST_TABLE")
    return Path(chosen) if chosen and chosen != "built-in" else cache_path(device)


def fit_constants(timings: Sequence[Timing]) -> Constants | None:
    """Constants that bring the model's times closest to the measured ones, in relative error; None if nothing does."""

    def solve(form: Form, required: int) -> list[float] | None:
        parts = torch.tensor([timing.parts[form] for timing in timings], dtype=torch.float64)
        seconds = torch.tensor([timing.seconds[form] for timing in timings], dtype=torch.float64)
        return _non_negative_least_squares(parts / seconds[:, None], required)

    direct, gram = solve("direct", required=1), solve("gram", required=0)
    if direct is None or gram is None:
        return None
    values = [value / direct[0] for value in (*direct[1:], *gram)]
    return dict(zip((*DIRECT, *GRAM), values, strict=True))


def _non_negative_least_squares(rows: Tensor, required: int) -> list[float] | None:
    """``x >= 0`` that brings ``rows @ x`` closest to 1; the first ``required`` entries must be positive.

    There are at most eight unknowns, so every set of those that are not 0 is tried.
    """
    columns = rows.shape[1]
    scale = rows.abs().amax(0)
    usable = [k for k in range(columns) if scale[k] > 0]
    best: tuple[float, list[float]] | None = None
    for size in range(1, len(usable) + 1):
        for chosen in combinations(usable, size):
            if size > rows.shape[0] or not set(range(required)) <= set(chosen):
                continue
            kept = list(chosen)
            a = rows[:, kept] / scale[kept]
            solution = torch.linalg.lstsq(a, torch.ones(len(a), 1, dtype=a.dtype), driver="gelsd").solution[:, 0]
            if not bool((solution > 0).all()):
                continue
            error = float((a @ solution - 1).square().sum())
            if best is None or error < best[0]:
                x = [0.0] * columns
                for k, value in zip(kept, (solution / scale[kept]).tolist(), strict=True):
                    x[k] = value
                best = error, x
    return best[1] if best else None


def _compare(precision: str, timings: Sequence[Timing], rounds: int, before: Constants, after: Constants | None) -> Fit:
    tables = before, after or before
    held_out = [timing for i, timing in enumerate(timings) if is_held_out(i)] or list(timings)
    right = [fmean(timing.regret(table) == 0 for timing in timings) for table in tables]
    regret = [fmean(timing.regret(table) for timing in timings) for table in tables]
    unseen = [fmean(timing.regret(table) for timing in held_out) for table in tables]
    accepted = after is not None and regret[1] <= regret[0] and unseen[1] <= unseen[0]
    return Fit(
        precision,
        len(timings),
        rounds,
        (right[0], right[1]),
        (regret[0], regret[1]),
        (unseen[0], unseen[1]),
        accepted,
    )


def is_held_out(index: int) -> bool:
    """Whether a layer judges the fit and is not fitted: every third one."""
    return index % 3 == 1


def measure_layers(device: str, precision: str, seconds: float) -> tuple[list[Timing], int]:
    """Median times of every layer in both forms, which take turns; and how often each form was timed."""
    cost_precision = "float32" if precision == ANY else precision
    dtype = torch.float32 if precision in (ANY, "tf32") else getattr(torch, precision)
    costs = [layer.cost(device, cost_precision) for layer in LAYERS]
    sizes = [_examples(device, cost) for cost in costs]
    stop = time.perf_counter() + seconds
    samples: list[dict[Form, list[float]]] = [{"direct": [], "gram": []} for _ in LAYERS]
    with torch.no_grad(), _products(precision):
        calls = [layer.call(n, device, dtype) for layer, n in zip(LAYERS, sizes, strict=True)]
        for call in calls:  # a first call loads kernels and allocates workspaces, and is not timed
            for form in FORMS:
                call(form)
        for rounds in range(1, MOST_ROUNDS + 1):
            order = FORMS if rounds % 2 else FORMS[::-1]
            for call, sample in zip(calls, samples, strict=True):
                for form in order:
                    sample[form].append(_seconds(device, call, form))
            if time.perf_counter() > stop:
                break
    timings = [
        Timing(
            {"direct": list(cost.direct_parts), "gram": list(cost.gram_parts)},
            {form: median(sample[form]) / n for form in FORMS},
        )
        for cost, sample, n in zip(costs, samples, sizes, strict=True)
    ]
    return timings, rounds


def _examples(device: str, cost: Any) -> int:
    """How many examples to time at once: enough that the fixed cost of a call is small, and not many more."""
    if device == "cpu":
        return torch.get_num_threads() * int(min(64, max(4, 2e7 / cost.direct_flops)))
    return int(min(512, max(32, 2**24 / cost.elements)))


def _seconds(device: str, call: Callable[[Form], Tensor], form: Form) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call(form)
        return time.perf_counter() - start
    with torch.cuda.device(device):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        keep_device_busy(BUSY_CYCLES)
        first.record()
        call(form)
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Allows TF32 inside the context, or forbids it, as the precision says."""
    cudnn: Any = torch.backends.cudnn
    switches = (torch.backends.cuda.matmul, cudnn.conv) if precision in ("tf32", "float32") else ()
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
