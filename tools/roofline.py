"""Predicts how long a network's norms take by the direct form on an H100, from machine code and plans.

And what that makes of a step. Nothing is measured.

    python tools/roofline.py [library or objects of nvcc]          of the built extension by default

A layer takes the longest of four times, as if nothing else ever waited:

    bytes    x and gy once from memory at 3.35 TB/s (what blocks read again comes from L2)
    mma      one m16n8k8 TF32 or m16n8k16 bfloat16 every four issue slots of a sub-core, the headline rate; padding of
             tiles included, but not what idle warps and half tiles leave out
    slots    executed instructions of all warps (tools/machine_code.py), one a cycle and sub-core
    shared   accesses to shared memory, 128 bytes a cycle and multiprocessor, without conflicts

at 132 multiprocessors of 4 sub-cores and 1.7 GHz, with whole turns of the blocks that run at once. Latencies, waits at
barriers and conflicts are left out, so this is a lower bound of the time. The share is that of useful products:
2·T·C·d·taps FLOPs at the headline rate of 495 TFLOP/s in TF32 or 989 in bfloat16, divided by the predicted time. Left
out are 1×1 shortcuts and layers of 4×4 pixels, which take the Gram form; a layer whose channels do not fill 16 bytes
counts as channels first in either order.

The ratio is that of a plain step of ENGM to one of SGD, of the same layers, each with a normalisation of its examples
and a ReLU behind it. SGD's convolutions run at the ceiling: forward, backward to the weight and, but for the images',
to the input, each as long as its products at the headline rate or its bytes once; the rest reads and writes the layer's
output 13 times (the normalisation 3 times forward and 5 backward, the ReLU 2 and 3). ENGM adds the predicted norm, and
4 more: the normalisation's norms read two maps, and scaled backprops are read and written.
"""

import argparse
import sys
from pathlib import Path

from disassembly import Kernel, read
from machine_code import BYTES, Layer, executed, kernel_of, plan_of

PROCESSORS, SUB_CORES, CLOCK, MEMORY = 132, 4, 1.7e9, 3.35e12
HEADLINE = {"tf32": 495e12, "bfloat16": 989e12}
SLOTS_A_PRODUCT = 4
EXAMPLES = 128
MAPS_OF_SGD, MAPS_OF_ENGM = 13, 4  # readings and writings of a layer's output; those of ENGM are on top
IMAGE_CHANNELS = 3


def stage(channels: int, width: int, size: int, blocks: int, stride: int) -> list[Layer]:
    """Residual blocks of two 3×3 convolutions, the first of them all with a stride."""
    return [Layer(channels, width, size, 3, stride, 1)] + [Layer(width, width, size // stride)] * (2 * blocks - 1)


NETWORKS = {
    "ResNet-18": [Layer(3, 64, 32), *stage(64, 64, 32, 2, 1), *stage(64, 128, 32, 2, 2), *stage(128, 256, 16, 2, 2)],
    "VGG-8": [
        Layer(3, 128, 32),
        Layer(128, 128, 32),
        Layer(128, 256, 16),
        Layer(256, 256, 16),
        Layer(256, 512, 8),
        Layer(512, 512, 8),
    ],
    "WRN-34-10": [Layer(3, 16, 32), *stage(16, 160, 32, 5, 1), *stage(160, 320, 32, 5, 2), *stage(320, 640, 16, 5, 2)],
}


def up_to(count: int, step: int) -> int:
    """The next multiple."""
    return -(-count // step) * step


def times(layer: Layer, kernels: list[Kernel], precision: str, channels_last: bool) -> dict[str, float]:
    """The four times of a layer in seconds, and the useful products'."""
    last = channels_last and layer.channels % (16 // BYTES[precision]) == 0
    plan = plan_of(layer, precision, last, "sm_90", EXAMPLES, PROCESSORS)
    count = executed(kernel_of(kernels, plan), plan, BYTES[precision], EXAMPLES)
    channels, rows, warps_c, warps_d, _, _, blocks = plan.tile
    resident = max(1, min(blocks, 227 * 1024 // plan.shared))
    turns = -(-plan.tiles * plan.share // (PROCESSORS * resident))
    # The part of the tiles that is multiplied: warps without channels of their own and halves without rows are not.
    filled = up_to(layer.channels, channels // warps_c) / up_to(layer.channels, channels)
    filled *= up_to(layer.rows, rows // warps_d // 2) / up_to(layer.rows, rows)
    tiles = turns * resident * -(-EXAMPLES // plan.share)  # of the multiprocessor with most
    a_slot = tiles * warps_c * warps_d / SUB_CORES / CLOCK
    return {
        "bytes": EXAMPLES
        * BYTES[precision]
        * (layer.channels * layer.size**2 + layer.rows * layer.outputs**2)
        / MEMORY,
        "mma": count.products * filled * SLOTS_A_PRODUCT * a_slot,
        "slots": (count.all - count.parts["multiply"] * (1 - filled)) * a_slot,
        "shared": (count.shared * filled) * tiles * warps_c * warps_d / CLOCK,
        "useful": 2 * layer.products * EXAMPLES / HEADLINE[precision],
    }


def step_times(layer: Layer, precision: str, norm: float) -> tuple[float, float]:
    """Seconds of SGD's and of ENGM's step that a layer is in for, if its norm takes `norm`."""
    a_map = EXAMPLES * BYTES[precision] * layer.rows * layer.outputs**2 / MEMORY
    read = EXAMPLES * BYTES[precision] * layer.channels * layer.size**2 / MEMORY
    products = 2 * layer.products * EXAMPLES / HEADLINE[precision]
    sgd = (2 if layer.channels == IMAGE_CHANNELS else 3) * max(products, read + a_map) + MAPS_OF_SGD * a_map
    return sgd, sgd + norm + MAPS_OF_ENGM * a_map


def main() -> None:
    """Prints a row for every network, precision and order of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("code", nargs="*", type=Path, help="a library or objects of nvcc")
    parser.add_argument("--layers", action="store_true", help="print every layer")
    arguments = parser.parse_args()
    paths = arguments.code
    if not paths:
        from engm import _C

        paths = [Path(_C.__file__)]
    kernels = read(paths, "sm_90")
    sys.stdout.write(
        "| network | precision | memory | bytes, ms | mma | slots | shared | predicted | share of the ceiling | "
        "ENGM / SGD |\n"
    )
    sys.stdout.write("|---|---|---|---|---|---|---|---|---|---|\n")
    for network, layers in NETWORKS.items():
        for precision in HEADLINE:
            for last in (False, True):
                found = [times(layer, kernels, precision, last) for layer in layers]
                total = {name: 1e3 * sum(t[name] for t in found) for name in found[0]}
                norms = [max(t["bytes"], t["mma"], t["slots"], t["shared"]) for t in found]
                predicted = 1e3 * sum(norms)
                steps = [step_times(layer, precision, norm) for layer, norm in zip(layers, norms, strict=True)]
                ratio = sum(engm for _, engm in steps) / sum(sgd for sgd, _ in steps)
                if arguments.layers:
                    for layer, t in zip(layers, found, strict=True):
                        sys.stdout.write(f"  {layer} { ({name: round(1e3 * v, 3) for name, v in t.items()}) }\n")
                sys.stdout.write(
                    f"| {network} | {precision} | channels {'last' if last else 'first'} | {total['bytes']:.2f} | "
                    f"{total['mma']:.2f} | {total['slots']:.2f} | {total['shared']:.2f} | {predicted:.2f} | "
                    f"{100 * total['useful'] / predicted:.0f} % | {ratio:.2f} |\n"
                )


if __name__ == "__main__":
    main()
