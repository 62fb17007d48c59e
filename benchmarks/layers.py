"""One 3x3 convolution layer: our norms in either form beside oneDNN's weight gradient of the summed batch.

python benchmarks/layers.py [--threads 2] [--out benchmarks/results/cpu/layers.json]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import output
import torch

from engm import ops
from engm.terms import ConvGeometry, conv_weight_gradient

SHAPES = [(32, 32), (64, 16), (128, 8), (256, 4)]  # channels, side of the map
GEOMETRY = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)


def contenders(channels: int, side: int, n: int) -> dict[str, Callable[[], object]]:
    """One call of every contender on fresh random data, by name."""
    x, gy = torch.randn(n, channels, side, side), torch.randn(n, channels, side, side)
    geometry = (GEOMETRY.kernel_size, GEOMETRY.stride, GEOMETRY.padding, GEOMETRY.dilation, GEOMETRY.groups)
    return {
        "onednn weight gradient": lambda: conv_weight_gradient(x, gy, GEOMETRY),
        "direct": lambda: ops.conv_norm_sq(x, gy, *geometry, form="direct"),
        "gram": lambda: ops.conv_norm_sq(x, gy, *geometry, form="gram"),
        "auto": lambda: ops.conv_norm_sq(x, gy, *geometry),
        "direct, gradient kept": lambda: ops.conv_grads(x, gy, *geometry),
    }


def main() -> None:
    """Times all contenders in turn, and prints the least milliseconds of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {}
    for channels, side in SHAPES:
        calls = contenders(channels, side, args.batch)
        least = dict.fromkeys(calls, float("inf"))
        for _ in range(args.rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                least[name] = min(least[name], 1e3 * (time.perf_counter() - start))
        result[f"{channels} channels, {side}x{side}"] = {name: round(value, 2) for name, value in least.items()}
        print(
            f"{channels} channels, {side}x{side}:", "  ".join(f"{k} {v:.1f} ms" for k, v in least.items()), flush=True
        )
    if args.out:
        output.save(args.out, {"machine": output.machine(), "batch": args.batch, "milliseconds": result})


if __name__ == "__main__":
    main()
