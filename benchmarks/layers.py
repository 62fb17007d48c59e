"""Every CPU operator by itself, on one thread and on several: milliseconds, and what the other threads gain.

A 3x3 convolution is timed in both forms beside oneDNN's weight gradient of the summed batch, which is what plain
training pays for the layer. All of it takes turns, and the least time counts.

    python benchmarks/layers.py [--threads 2] [--out benchmarks/results/cpu/layers.json]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import output
import torch

from engm import ops
from engm.terms import ConvGeometry, conv_weight_gradient

Calls = Mapping[str, Callable[[], object]]

SHAPES = [(32, 32), (64, 16), (128, 8), (256, 4)]  # channels, side of the map
GEOMETRY = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
LEAST_GAIN_OF_TWO = 1.7  # what two threads have to gain; more threads in proportion


def convolution(channels: int, side: int, n: int) -> Calls:
    """Name to one call on random data."""
    x, gy = torch.randn(n, channels, side, side), torch.randn(n, channels, side, side)
    geometry = (GEOMETRY.kernel_size, GEOMETRY.stride, GEOMETRY.padding, GEOMETRY.dilation, GEOMETRY.groups)
    return {
        "onednn weight gradient": lambda: conv_weight_gradient(x, gy, GEOMETRY),
        "direct": lambda: ops.conv_norm_sq(x, gy, *geometry, form="direct"),
        "gram": lambda: ops.conv_norm_sq(x, gy, *geometry, form="gram"),
        "auto": lambda: ops.conv_norm_sq(x, gy, *geometry),
        "direct, gradient kept": lambda: ops.conv_grads(x, gy, *geometry),
    }


def other_convolutions(n: int) -> Calls:
    """Grouped and depthwise ones, and the correction of batch norm."""
    x, gy = torch.randn(n, 128, 16, 16), torch.randn(n, 128, 16, 16)
    geometry = (GEOMETRY.kernel_size, GEOMETRY.stride, GEOMETRY.padding, GEOMETRY.dilation)
    shift, scale = torch.randn(n, 128), torch.randn(n, 128)
    mean, correlation = torch.randn(128, 3, 3), torch.randn(128, 128, 3, 3)
    return {
        "32 groups": lambda: ops.conv_norm_sq(x, gy, *geometry, 32, "direct"),
        "depthwise": lambda: ops.conv_norm_sq(x, gy, *geometry, 128, "direct"),
        "corrected": lambda: ops.conv_norm_sq(x, gy, *geometry, 1, "direct", shift, mean, scale, correlation),
    }


def linear(n: int) -> Calls:
    """A layer of a transformer, and one behind a pooled image."""
    a, b = torch.randn(n, 128, 256), torch.randn(n, 128, 256)
    pooled, logits = torch.randn(4 * n, 1, 2048), torch.randn(4 * n, 1, 1000)
    return {
        "direct": lambda: ops.linear_norm_sq(a, b, "direct"),
        "gram": lambda: ops.linear_norm_sq(a, b, "gram"),
        "gradient kept": lambda: ops.linear_grads(a, b),
        "one position": lambda: ops.linear_norm_sq(pooled, logits),
    }


def elementwise(n: int) -> Calls:
    """Operators that are bound by memory."""
    image, tokens = torch.randn(n, 64, 1024), torch.randn(n, 128, 768)
    of_image, of_tokens = torch.rand(1, 64, 1), torch.rand(n, 128, 1)
    indices, rows = torch.randint(0, 1000, (n, 256)), torch.randn(n, 256, 256)
    squares, weights, layers = torch.rand(60, 64 * n), torch.rand(n), [torch.randn(n, 256, 64) for _ in range(4)]
    return {
        "batch norm": lambda: ops.affine_norm_sq(image, image, of_image, of_image, 1),
        "layer norm": lambda: ops.affine_norm_sq(tokens, tokens, of_tokens, of_tokens, 2),
        "embedding": lambda: ops.embedding_norm_sq(indices, rows),
        "clip weights": lambda: ops.clip_weights(squares, 1.0),
        "scale examples": lambda: ops.scale_examples(layers, weights),
        "weighted sums": lambda: ops.weighted_sums(layers, weights),
    }


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def measure(calls: Calls, threads: int, rounds: int) -> dict[str, dict[str, Any]]:
    """The least milliseconds of each call on one and on several threads, and their ratio."""
    counts = (1, threads)
    least = {name: dict.fromkeys(counts, float("inf")) for name in calls}
    for _ in range(rounds):
        for count in counts:
            torch.set_num_threads(count)
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                least[name][count] = min(least[name][count], 1e3 * (time.perf_counter() - start))
    return {
        name: {
            "milliseconds on one thread": _three_digits(times[1]),
            "milliseconds": _three_digits(times[threads]),
            "speed-up": _three_digits(times[1] / times[threads]),
        }
        for name, times in least.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints one table a layer, and names the operators that gain too little."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    least_gain = LEAST_GAIN_OF_TWO / 2 * args.threads
    layers: dict[str, Callable[[], Calls]] = {
        f"{channels} channels, {side}x{side}": lambda size=(channels, side): convolution(*size, args.batch)  # type: ignore[misc]
        for channels, side in SHAPES
    }
    layers["other convolutions"] = lambda: other_convolutions(args.batch)
    layers["linear"] = lambda: linear(args.batch)
    layers["elementwise"] = lambda: elementwise(args.batch)
    found, slow = {}, []
    for layer, make in layers.items():
        found[layer] = measure(make(), args.threads, args.rounds)
        rows = []
        for name, figures in found[layer].items():
            one, several, gain = figures.values()
            enough = args.threads == 1 or gain >= least_gain
            rows.append(
                [name, f"{one:.2f}", f"{several:.2f}", f"{gain:.2f}", "" if enough else f"below {least_gain:.1f}"]
            )
            slow += [] if enough else [f"{layer}: {name} ({gain:.2f})"]
        output.show(layer, ["milliseconds", "1 thread", f"{args.threads} threads", "speed-up", ""], rows)
    if slow:
        print(f"NOTE: {args.threads} threads gain less than {least_gain:.1f} in: {'; '.join(slow)}", flush=True)
    if args.out:
        document = {"machine": output.machine(), "threads": args.threads, "batch": args.batch, "layers": found}
        output.save(args.out, document | {f"below {least_gain:.1f}": slow})


if __name__ == "__main__":
    main()
