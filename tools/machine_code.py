"""What kernels take of a multiprocessor, and what a warp of the direct form's executes for a layer, from machine code.

    python tools/machine_code.py [library or objects of nvcc]     a table; of the built extension by default
    python tools/machine_code.py --kernels                        the families of kernels in the place of layers
    python tools/machine_code.py --check                          fails where a limit is passed

A kernel's loops are told apart by what is in them (matrix instructions, asynchronous copies, barriers). How often each
runs for a layer follows from the plan, which tools/machine_plan.cpp prints. What lies between loops is counted along
the longest path that avoids the loops of the other orders of memory, and corrections: the figures are upper bounds.
tools/roofline.py adds them up over networks.
"""

import argparse
import atexit
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from disassembly import Block, Kernel, Loop, Resources, all_loops, by_kind, read, resources, shared_cycles

ROOT = Path(__file__).resolve().parents[1]
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10}  # bytes of one block, at most
COPIES = ("elements", "rows", "lines")  # csrc/cuda/direct_norm.h
POLICIES = {"tf32": "Tf32InPlace", "bfloat16": "BFloat16"}
BYTES = {"tf32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Layer:
    """A convolution with square kernel, stride and padding."""

    channels: int
    rows: int
    size: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1

    @property
    def outputs(self) -> int:
        """Its output positions in a line."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def products(self) -> int:
        """Multiplications of one example's weight gradient."""
        return self.outputs**2 * self.channels * self.rows * self.kernel**2


LARGEST = (Layer(64, 64, 32), Layer(128, 128, 16), Layer(256, 256, 8))  # of ResNet-18
# What --check and tests hold: executed instructions a matrix instruction and a copy, and bytes of a copy.
MOST_A_PRODUCT, MOST_A_COPY = 7.0, 12.0
WIDEST_COPY = 16


@dataclass(frozen=True)
class Staging:
    """The plan of an operand's copies; entries and the rest are of copies by lines."""

    copies: str  # one of COPIES
    rows: int
    entries: int
    lanes: int
    batches: int


@dataclass(frozen=True)
class Plan:
    """The plan of one layer."""

    policy: str
    tile: tuple[int, ...]
    tiles: int
    shared: int
    share: int  # blocks that share a tile's examples
    taps: int
    steps: int
    positions: int
    staging: tuple[Staging, Staging]


@functools.cache
def planner() -> Path:
    """The compiled tools/machine_plan.cpp."""
    folder = tempfile.mkdtemp(prefix="engm_plan_")
    atexit.register(shutil.rmtree, folder)
    out = Path(folder) / "plan"
    include = [f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'tests/emulator'}"]
    flags = ["-std=c++17", "-O1", "-DENGM_EMULATOR", "-Wno-unknown-pragmas", *include, "-o", str(out)]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, str(ROOT / "tools/machine_plan.cpp")], check=True)
    return out


def plan_of(
    layer: Layer, precision: str, channels_last: bool, architecture: str, n: int = 128, processors: int = 132
) -> Plan:
    """What the binding and direct_launch.cuh plan for contiguous operands."""
    words = [
        precision,
        int(channels_last),
        SHARED[architecture],
        processors,
        n,
        layer.channels,
        layer.rows,
        layer.size,
        layer.size,
        layer.kernel,
        layer.stride,
        layer.padding,
    ]
    text = subprocess.run(
        [planner()], input=" ".join(map(str, words)), capture_output=True, text=True, check=True
    ).stdout
    policy, *numbers = text.split()
    m = [int(number) for number in numbers]
    x, gy = (Staging(COPIES[of[0]], *of[1:]) for of in (m[13:18], m[18:23]))
    return Plan(policy, tuple(m[:7]), *m[7:13], (x, gy))


@dataclass(frozen=True)
class Executed:
    """What a warp executes for one tile, on average over a block's warps."""

    products: float  # matrix instructions
    copies: float  # asynchronous copies
    narrowest: int  # bytes of the narrowest of them
    in_copies: float  # instructions of the loops that copy
    all: float
    shared: float  # cycles of shared memory
    parts: dict[str, float]

    @property
    def a_product(self) -> float:
        """Instructions a matrix instruction."""
        return self.all / self.products

    @property
    def a_copy(self) -> float:
        """Instructions of the copying loops a copy."""
        return self.in_copies / self.copies if self.copies else 0.0

    @property
    def a_copy_aimed(self) -> float:
        """The same with what prepares the tables of addresses of each step."""
        return (self.in_copies + self.parts["aim"]) / self.copies if self.copies else 0.0


def narrowest_copy(loop: Loop) -> int:
    """Bytes of the narrowest asynchronous copy in a loop that has some."""
    texts = [text for block in loop.blocks for text in block.code]
    found = [re.search(r"\bLDGSTS\b\S*?(?:\.(64|128))?(?:\s|$)", text) for text in texts if "LDGSTS" in text]
    return min(int(match[1] or 32) // 8 for match in found if match)


def up(a: float, b: int) -> int:
    """Divided and rounded up, never negative."""
    return max(0, -(-int(a) // b))


def executed(kernel: Kernel, plan: Plan, element: int, n: int = 128) -> Executed:
    """Counts one tile of one example; a block's own instructions are shared by its examples."""
    tile = plan.tile
    warps, vector, depth = tile[2] * tile[3], 16 // element, 8 if element == 4 else 16
    threads = 32 * warps
    step = next(
        loop
        for loop in all_loops(kernel.whole)
        if loop.kind == "step" and not any(inner.kind == "step" for inner in loop.inside)
    )
    examples = next(loop for loop in all_loops(kernel.whole) if step in loop.inside)
    around = next(loop for loop in all_loops(kernel.whole) if examples in loop.inside)
    of_kind, at_first = by_kind(step), by_kind(around)
    multiply = max(of_kind["multiply"], key=lambda loop: (loop.count("[HD]MMA"), -loop.path()))
    parts = {"multiply": plan.positions / depth * multiply.path(), "copy": 0.0, "prepare": 0.0, "aim": 0.0}
    copies, shared = 0.0, plan.positions / depth * shared_cycles(multiply)
    narrowest: list[int] = []
    used, idle = {id(multiply)}, [list[Loop | Block]() for _ in range(warps)]
    for which, (staging, width) in enumerate(zip(plan.staging, tile[:2], strict=True)):
        chunks, lines = width // vector, staging.copies == "lines"
        if staging.copies == "elements":
            raise LookupError(
                "Copies of single elements are not counted: channels or pixels of a line fill no 16 bytes."
            )
        names = ("lines", "transpose", "aim") if lines else ("rows", "pairs", "row", "round", "aim")
        loops = {name: of_kind[name][which] for name in names if name in of_kind}
        narrowest += [narrowest_copy(loops[name]) for name in ("lines", "rows", "pairs", "row") if name in loops]
        used |= {id(at[name][which]) for at in (of_kind, at_first) for name in names if which < len(at.get(name, []))}
        for warp in range(warps):
            entries = staging.entries or staging.rows
            if entries <= 32 * warp:
                idle[warp].append(loops["aim"])
            parts["aim"] += up(entries - 32 * warp, threads) * loops["aim"].path() / warps
            if lines:
                trips, inner = up(staging.entries, staging.lanes), loops["lines"].inside[0]
                cost = trips * (loops["lines"].path() + staging.batches * inner.path())
                copies += trips * staging.batches * inner.count("LDGSTS") / warps
                shared += trips * staging.batches * shared_cycles(inner) / warps
                pieces = 1 if width >= 32 else 32 // width
                turns = up(staging.entries - warp * pieces, warps * pieces)
                parts["prepare"] += turns * loops["transpose"].path() / warps
                shared += turns * shared_cycles(loops["transpose"]) / warps
            else:
                stride, of_lanes = threads // chunks, {lane // chunks for lane in range(32 * warp, 32 * warp + 32)}
                left, cost = [staging.rows - row for row in of_lanes], 0
                for name, batch in (("rows", 4), ("pairs", 2), ("row", 1)):
                    turns = [up(rows - (batch - 1) * stride, batch * stride) for rows in left]
                    left = [rows - turn * batch * stride for rows, turn in zip(left, turns, strict=True)]
                    cost += max(turns) * loops[name].path()
                    copies += max(turns) * batch / warps
                    shared += max(turns) * shared_cycles(loops[name]) / warps
                if "round" in loops:
                    each = loops["round"].path() / loops["round"].count(r"STS\.128")
                    turns = up(staging.rows - min(of_lanes), stride)
                    parts["prepare"] += turns * each / warps
                    shared += turns * 8 / warps
            parts["copy"] += cost / warps
    others = [loop for loop in step.inside if id(loop) not in used]
    for loops in idle:
        if len(loops) == 2:
            loops += step.serving(loops[:])
    parts["rest of a step"] = sum(step.path([*others, *idle[warp]]) for warp in range(warps)) / warps
    parts = {name: count * plan.steps for name, count in parts.items()}
    parts["squares"] = (examples.path() + (warps - 1) * examples.path(without="LDG|STG")) / warps  # one warp stores
    # Tables take a trip; loops in loops fill in zeros for channels that are none.
    tables = [loop for loop in around.inside if loop.kind == "other" and not loop.inside]
    idle_at_first = [
        loop for loop in around.inside if id(loop) not in used and loop not in tables and loop is not examples
    ]
    parts["a block"] = (around.path(idle_at_first) + sum(loop.path() for loop in tables)) / up(n, plan.share)
    total = sum(parts.values())
    products = plan.steps * plan.positions / depth * multiply.count("[HD]MMA")
    return Executed(products, copies * plan.steps, min(narrowest), parts["copy"], total, shared * plan.steps, parts)


def kernel_of(kernels: Iterable[Kernel], plan: Plan) -> Kernel:
    """The kernel that a plan asks for."""
    for kernel in kernels:
        if kernel.tile == (plan.policy, plan.tile):
            return kernel
    raise LookupError(f"No kernel for the tile {plan.policy} {plan.tile} was given.")


def largest(kernels: list[Kernel], architecture: str) -> Iterator[tuple[str, str, Layer, Kernel, Plan, Executed]]:
    """Precision, order of memory, layer, kernel, plan and counts of the three largest layers of ResNet-18."""
    for precision in POLICIES:
        for last in (False, True):
            for layer in LARGEST:
                plan = plan_of(layer, precision, last, architecture)
                kernel = kernel_of(kernels, plan)
                order = f"channels {'last' if last else 'first'}"
                yield precision, order, layer, kernel, plan, executed(kernel, plan, BYTES[precision])


def table(kernels: list[Kernel], taken: list[Resources], architecture: str) -> tuple[str, list[str]]:
    """The three largest layers of ResNet-18 as Markdown, and what passes a limit."""
    lines = [
        "| precision | memory | layer | registers | shared KiB | warps of 64 | instructions an `mma` | a copy | "
        "bytes a copy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    of_name = {use.name: use for use in taken}
    wrong = [f"{use.name} spills {use.spills} bytes" for use in taken if use.spills]
    for precision, order, layer, kernel, plan, count in largest(kernels, architecture):
        size = f"{layer.channels} × {layer.size}²"
        lines.append(
            f"| {precision} | {order} | {size} | {kernel.registers} | {plan.shared / 1024:.0f} | "
            f"{of_name[kernel.name].resident_warps(plan.shared)} | {count.a_product:.2f} | {count.a_copy:.1f} | "
            f"{count.narrowest} |"
        )
        if round(count.a_product, 2) > MOST_A_PRODUCT:  # as the table shows it
            wrong.append(f"{precision}, {order}, {size}: {count.a_product:.2f} instructions an mma")
        if count.a_copy > MOST_A_COPY:
            wrong.append(f"{precision}, {order}, {size}: {count.a_copy:.1f} instructions a copy")
        if count.narrowest < WIDEST_COPY:
            wrong.append(f"{precision}, {order}, {size}: copies of {count.narrowest} bytes")
    return "\n".join(lines), wrong


def families(taken: list[Resources]) -> str:
    """The families of kernels as Markdown: the least and the most of their kernels."""

    def span(numbers: Iterable[int]) -> str:
        found = sorted(numbers)
        return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"

    lines = [
        "| family | kernels | threads | registers | spilled bytes | warps of 64 by registers |",
        "|---|---|---|---|---|---|",
    ]
    for family in sorted({use.family for use in taken}):
        of_family = [use for use in taken if use.family == family]
        columns = [
            [use.threads for use in of_family],
            [use.registers for use in of_family],
            [use.spills for use in of_family],
            [use.resident_warps() for use in of_family],
        ]
        lines.append(f"| `{family}` | {len(of_family)} | {' | '.join(span(column) for column in columns)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table and, where asked, complains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("code", nargs="*", type=Path, help="a library or objects of nvcc")
    parser.add_argument("--architecture", default="sm_90", choices=SHARED)
    parser.add_argument("--kernels", action="store_true", help="print what the families of kernels take")
    parser.add_argument("--check", action="store_true", help="fail where a limit is passed")
    parser.add_argument("--parts", action="store_true", help="print what the instructions of a tile are for")
    arguments = parser.parse_args()
    paths = arguments.code
    if not paths:
        from engm import _C

        paths = [Path(_C.__file__)]
    taken = resources(paths, arguments.architecture)
    if arguments.kernels:
        sys.stdout.write(families(taken) + "\n")
        return
    kernels = read(paths, arguments.architecture)
    text, wrong = table(kernels, taken, arguments.architecture)
    sys.stdout.write(text + "\n")
    if arguments.parts:
        for precision, order, layer, _, plan, count in largest(kernels, arguments.architecture):
            parts = {name: round(n / count.products, 2) for name, n in count.parts.items()}
            sys.stdout.write(
                f"{precision}, {order}, {layer.channels}: {plan.steps} steps of {plan.positions}: {parts}, "
                f"{count.a_copy_aimed:.1f} a copy with the tables of each step\n"
            )
    if arguments.check and wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
