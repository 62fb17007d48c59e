"""Peak memory of a plain step, one contender alive at a time, over batch sizes; and where the time of a step goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import steps
from .record import Stage
from .steps import Setting
from .timing import Bench, precision

NETWORKS = [
    Setting("resnet18", "group", "tf32"),
    Setting("resnet18", "batch", "tf32"),
    Setting("resnet18", "group", "bf16", "nhwc"),
    Setting("wrn34-10", "group", "tf32"),
    Setting("vgg8", "group", "tf32"),
    Setting("vit-s", "layer", "tf32"),
]
SHOWN = 30  # kernels of a profile


def run(bench: Bench, stage: Stage, arguments: Any) -> None:
    """Records what steps allocate above what lives before them, in megabytes and against SGD."""
    batches = [2] if bench.tiny else [arguments.batch, 4 * arguments.batch]
    for n in batches:
        for setting in steps.TINY if bench.tiny else NETWORKS:
            if setting.network == "wrn34-10" and n > arguments.batch:
                continue  # this would take half a minute
            stage.case(f"{setting} n={n}", lambda s=setting, n=n: _peaks(bench, s, n), n=n, network=str(setting))


def _peaks(bench: Bench, setting: Setting, n: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with precision("tf32"):
        for name, maker in steps.plain_steps(setting, bench, n).items():
            if "naive" in name or "calibrating" in name:
                continue
            built, failed = steps.build({name: maker})
            try:
                for step in built.values():
                    step()  # the first step allocates momentum, checks the network and calibrates
                    step()
                    peak = bench.peak_bytes(step)
                    figures[name] = {"peak megabytes": None if peak is None else round(peak / 1e6, 1)}
            except Exception as error:
                if name == "sgd":
                    raise
                failed = {name: {"error": f"{type(error).__name__}: {str(error)[:300]}"}}
            figures |= failed
            del built
            if bench.cuda:
                torch.cuda.empty_cache()
    base = figures["sgd"]["peak megabytes"]
    for row in figures.values():
        if base and row.get("peak megabytes"):
            row["extra"] = round(row["peak megabytes"] / base - 1, 4)
    return {"contenders": figures}


def run_profile(bench: Bench, stage: Stage, arguments: Any) -> None:
    """Records the kernels of one step of each optimizer, by their own time on the device."""
    for setting in steps.TINY[:1] if bench.tiny else [*NETWORKS[:3], NETWORKS[5]]:
        n = steps.batch_of(setting, bench, arguments)
        for name in ("sgd", "engm", "nengm"):
            stage.case(f"{setting} | {name}", lambda s=setting, name=name, n=n: _profile(bench, s, name, n), n=n)


def _profile(bench: Bench, setting: Setting, name: str, n: int) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.real_cuda else [])]
    with precision("tf32"):
        torch.backends.cudnn.benchmark = bench.cuda
        try:
            step: Callable[[], object] = steps.plain_steps(setting, bench, n)[name]()
            for _ in range(3):
                step()
            bench.synchronize()
            with profile(activities=activities) as found:
                step()
                bench.synchronize()
        finally:
            torch.backends.cudnn.benchmark = False
    rows = []
    for event in found.key_averages():
        on_device = str(getattr(event, "device_type", "")).endswith("CUDA")
        if on_device == bench.real_cuda and "#" not in event.key:  # ranges of the host, as "Optimizer.step#SGD.step"
            micro = event.self_device_time_total if bench.real_cuda else event.self_cpu_time_total
            rows.append({"kernel": event.key[:160], "calls": event.count, "microseconds": round(micro, 1)})
    rows.sort(key=lambda row: -row["microseconds"])
    total = sum(row["microseconds"] for row in rows)
    own = sum(row["microseconds"] for row in rows if "engm" in row["kernel"])
    calls = sum(row["calls"] for row in rows)
    return {
        "microseconds": round(total, 1),
        "in engm's kernels": round(own, 1),
        "calls": calls,
        "kernels": rows[:SHOWN],
    }
