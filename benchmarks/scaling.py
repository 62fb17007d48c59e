"""How the cost of exact clipping grows: a plain step of ENGM and of SGD against batch, image, width and depth.

A ResNet of four stages with group norm; one quantity varies, the others stay at ``--n 32 --side 32 --width 16`` and two
blocks a stage (ResNet-18). At every point ENGM and SGD take turns: seconds, their ratio, the peak of what a step
allocates. Points come cheapest first, one of each axis in turn, until ``--budget`` seconds are over; the first point of
an axis is always measured, and points that were passed over are named. A fit through the points of an axis gives the
exponents of growth.

    python benchmarks/scaling.py --plot
    python benchmarks/scaling.py --n 128 --width 64 --device cuda --out benchmarks/results/gpu/scaling.json --plot
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import output
import torch
import workloads
from interleaved import Timing, compare

from engm.recipes.models.resnet import ResNet

AXES = {
    "n": ("examples in the batch", [0.25, 0.5, 1, 2, 4]),
    "side": ("image side, pixels", [0.25, 0.5, 0.75, 1, 1.5]),
    "width": ("channels of the stem", [0.5, 1, 2, 4]),
    "blocks": ("blocks in each of four stages", [0.5, 1, 1.5, 2]),
}


def axis_values(axis: str, base: int) -> list[int]:
    """The points of one axis: multiples of the base size, at least 1."""
    return sorted({max(1, round(factor * base)) for factor in AXES[axis][1]})


def measure(point: dict[str, int], rounds: int, device: str) -> dict[str, Timing]:
    """Times SGD and ENGM in turn at one point."""
    torch.manual_seed(0)
    net = ResNet([point["blocks"]] * 4, point["width"], norm="group").to(device)
    x, y = (t.to(device) for t in workloads.batch(point["n"], point["side"]))
    steps = {"sgd": workloads.plain_sgd(net, x, y), "engm": workloads.engm_step(net, x, y, "engm")}
    return compare(steps, reference="sgd", rounds=rounds)


def figures(point: dict[str, int], timings: dict[str, Timing]) -> dict[str, Any]:
    """What is recorded of a point."""
    sgd, ours = timings["sgd"], timings["engm"]
    return {
        "point": point,
        "sgd seconds": round(sgd.seconds, 6),
        "engm seconds": round(ours.seconds, 6),
        "ratio": round(ours.ratio, 4),
        "spread": round(ours.spread, 4),
        "sgd peak megabytes": round(sgd.peak_bytes / 1e6, 3),
        "engm peak megabytes": round(ours.peak_bytes / 1e6, 3),
        "extra peak": round(ours.peak_bytes / sgd.peak_bytes - 1, 4),
    }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Slope of the least-squares line through the logarithms; None without two positive points."""
    pairs = [(math.log(s), math.log(v)) for s, v in zip(sizes, values, strict=True) if v > 0]
    if len(pairs) < 2:
        return None
    return round(statistics.linear_regression(*zip(*pairs, strict=True)).slope, 3)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all points that the budget allows, and returns what the JSON holds."""
    base = {axis: getattr(args, axis) for axis in AXES}
    start = time.monotonic()
    axes: dict[str, Any] = {axis: {"points": [], "passed over": []} for axis in AXES}
    values = {axis: axis_values(axis, base[axis]) for axis in AXES}
    for rank in range(max(len(v) for v in values.values())):
        for axis in AXES:
            if rank >= len(values[axis]):
                continue
            point = base | {axis: values[axis][rank]}
            if rank and time.monotonic() - start > args.budget:
                axes[axis]["passed over"].append(point[axis])
                continue
            found = figures(point, measure(point, args.rounds, args.device))
            axes[axis]["points"].append(found)
            print(f"{axis} = {point[axis]}: x SGD {found['ratio']:.2f}, extra {found['extra peak']:+.0%}", flush=True)
    for axis, entry in axes.items():
        points = entry["points"]
        sizes = [p["point"][axis] for p in points]
        keys = ("sgd seconds", "engm seconds", "sgd peak megabytes", "engm peak megabytes")
        entry["exponents"] = {key: exponent(sizes, [p[key] for p in points]) for key in keys}
    return {
        "arguments": {**vars(args), "out": str(args.out)},
        "machine": output.machine(args.device),
        "seconds": round(time.monotonic() - start, 1),
        "axes": axes,
    }


def show(document: dict[str, Any]) -> None:
    """Print the points axis by axis."""
    columns = ["", "SGD s/step", "ENGM s/step", "x SGD", "spread", "SGD peak MB", "ENGM", "extra"]
    for axis, entry in document["axes"].items():
        cells = [
            [
                f"{axis} = {p['point'][axis]}", f"{p['sgd seconds']:.4f}", f"{p['engm seconds']:.4f}",
                f"{p['ratio']:.2f}", f"± {p['spread']:.2f}", f"{p['sgd peak megabytes']:.1f}",
                f"{p['engm peak megabytes']:.1f}", f"{p['extra peak']:+.0%}",
            ]
            for p in entry["points"]
        ]  # fmt: skip
        output.show(AXES[axis][0], columns, cells)
        if entry["passed over"]:
            print(f"  out of budget: {axis} = {entry['passed over']}")


def draw(document: dict[str, Any], path: Path) -> None:
    """Draws seconds above and peak memory below, a column for each axis, on logarithmic scales."""
    with output.picture(path, 2, len(AXES), (4 * len(AXES), 7)) as boxes:
        for column, (axis, entry) in enumerate(document["axes"].items()):
            points = entry["points"]
            sizes = [p["point"][axis] for p in points]
            time_box, memory_box = boxes[0][column], boxes[1][column]
            for box, quantity, share in ((time_box, "seconds", "ratio"), (memory_box, "peak megabytes", "extra peak")):
                ours = [p[f"engm {quantity}"] for p in points]
                box.plot(sizes, [p[f"sgd {quantity}"] for p in points], "o-", label="SGD")
                box.plot(sizes, ours, "s-", label="ENGM")
                for size, value, p in zip(sizes, ours, points, strict=True):
                    text = f"{p[share]:.2f}" if share == "ratio" else f"{p[share]:+.0%}"
                    box.annotate(text, (size, value), (0, 6), textcoords="offset points", ha="center", fontsize=8)
            time_box.set_title(AXES[axis][0], fontsize=10)
            for box in (time_box, memory_box):
                box.set_xscale("log", base=2)
                box.set_yscale("log")
                box.set_xticks(sizes, [str(size) for size in sizes])
                box.minorticks_off()
                box.margins(0.1, 0.15)
                box.grid(alpha=0.3, which="both")
        boxes[0][0].set_ylabel("seconds a step (numbers: ENGM / SGD)")
        boxes[1][0].set_ylabel("peak megabytes of a step (numbers: ENGM's extra)")
        boxes[0][0].legend(loc="lower right", fontsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which no further point is begun")
    output.add_options(parser, "scaling.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    document = run(args)
    show(document)
    output.save(args.out, document)
    if args.plot:
        draw(document, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
