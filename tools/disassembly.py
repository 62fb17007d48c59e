"""What kernels take of a multiprocessor, and what is in the machine code of the direct form's.

That is which loops, nested how, and the longest way through each. Code is read from the built extension or from objects
of nvcc by cuobjdump. Blocks that no branch leads to are left out.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


def cuobjdump() -> str:
    """The program of the toolkit, or the one in triton's package."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if found is None:
        raise FileNotFoundError(
            "cuobjdump is neither on PATH nor in triton's package: install the toolkit's, or triton."
        )
    return found


@dataclass(eq=False)
class Block:
    """Instructions that follow each other without a branch in or out."""

    first: int
    last: int = 0
    code: list[str] = field(default_factory=list)
    to: list[int] = field(default_factory=list)  # addresses of what may be next, -1 behind the end

    def count(self, word: str) -> int:
        """How many instructions there are of a name."""
        return sum(1 for text in self.code if re.match(rf"(?:@!?U?P\w+\s+)?{word}", text))

    @property
    def executed(self) -> int:
        """How many take an issue slot. Blank reads of shared memory, which the assembler puts before copies, do."""
        return sum(1 for text in self.code if not text.startswith("NOP"))


def shared_cycles(loop: "Loop") -> int:
    """Cycles of 128 bytes that one trip's accesses to shared memory take without conflicts, loops inside left out."""
    total = 0
    for text in (text for block in loop.own for text in block.code if not text.startswith("@!PT")):
        if found := re.search(r"\b(LDSM|LDS|STS|LDGSTS)\b(\S*)", text):
            matrices = re.search(r"\.([124])$", found[2]) if found[1] == "LDSM" else None
            total += int(matrices[1]) if matrices else 4 if ".128" in found[2] else 2 if ".64" in found[2] else 1
    return total


@dataclass(eq=False)
class Loop:
    """The blocks from `first` to the branch back at `last`; `inside` are loops, `own` the other blocks."""

    first: int
    last: int
    own: list[Block] = field(default_factory=list)
    inside: list["Loop"] = field(default_factory=list)

    @property
    def blocks(self) -> list[Block]:
        """Every block, those of loops inside too."""
        return [*self.own, *(block for loop in self.inside for block in loop.blocks)]

    def count(self, word: str) -> int:
        """Instructions of a name in all blocks."""
        return sum(block.count(word) for block in self.blocks)

    def path(self, avoid: Iterable["Loop | Block"] = (), without: str = "LDG") -> int:
        """Instructions of the longest way once through its own blocks, around what is to be avoided."""
        closed = {id(node) for node in avoid}
        best: dict[int, int] = {}
        for node in sorted([*self.own, *self.inside], key=lambda n: n.first, reverse=True):
            if isinstance(node, Loop):
                cost, exits = 0, {to for b in node.blocks for to in b.to if not node.first <= to <= node.last}
            else:
                cost, exits = node.executed, set(node.to)
            if id(node) in closed or (isinstance(node, Block) and node.count(rf"(?:{without})\b")):
                continue
            ways = [best[to] for to in exits if to > node.first and to in best]
            ends = self.first in exits or -1 in exits
            if ways or ends:
                best[node.first] = cost + max(ways, default=0)
        return best.get(self.first, 0)

    def serving(self, loops: list["Loop"]) -> list[Block]:
        """The blocks before and between loops that follow a branch around all of them."""
        end = max(loop.last for loop in loops)
        around = [
            b.first for b in self.own if b.first < min(loop.first for loop in loops) and any(to > end for to in b.to)
        ]
        return [b for b in self.own if around and around[-1] < b.first < end]

    @property
    def kind(self) -> str:
        """What it does, by what is in it."""
        asynchronous, batched = self.count("LDGSTS"), sum(b.count("LDGSTS") for b in self.own)
        if self.count("[HD]MMA"):
            return "step" if self.count("BAR") else "multiply"
        if asynchronous and not self.count(r"LDGSTS\S*BYPASS"):
            return "elements"
        if asynchronous:
            inner = max((loop.count("LDGSTS") for loop in self.inside), default=0)
            return {4: "rows", 2: "pairs", 1: "row"}[batched] if batched else ("lines" if inner > 1 else "few lines")
        if self.count("LDSM") or (self.count(r"LDS\.128") and not self.count(r"STS\.128")):
            return "transpose"
        if self.count(r"LDS\.128"):
            return "round"
        if self.count(r"STS\.64") and self.count("LDS"):
            return "aim"
        return "elements" if self.count(r"LDG\.") else "clear" if self.count(r"STS\.128") else "other"


def reachable(blocks: list[Block]) -> list[Block]:
    """The blocks that there is a way to."""
    at, found, ahead = {b.first: b for b in blocks}, set(), [blocks[0].first]
    while ahead:
        if (address := ahead.pop()) in at and address not in found:
            found.add(address)
            ahead += at[address].to
    return [b for b in blocks if b.first in found]


@dataclass
class Kernel:
    """One function of an architecture."""

    architecture: str
    name: str
    lines: list[tuple[int, str]] = field(default_factory=list)
    registers: int = 0
    spills: int = 0

    @property
    def tile(self) -> tuple[str, tuple[int, ...]] | None:
        """The policy and the numbers of a DirectTile of plain norms: channels, rows, warps, taps, stages, blocks."""
        found = re.search(r"direct_norm_kernel.*DirectTileINS0_\d+(\w+?)E((?:Li\d+E)+)EELb1E", self.name)
        return (found[1], tuple(int(n) for n in re.findall(r"Li(\d+)E", found[2]))) if found else None

    @functools.cached_property
    def whole(self) -> Loop:
        """The code as a loop that runs once, with its loops."""
        # BRA.DIV is for warps that are not together, which these never are; CALL.REL.NOINC comes back from nowhere.
        branches = ((a, re.search(r"\b(?:BRA\b(?!\.DIV)|CALL\.REL\.NOINC).*?(0x[0-9a-f]+)", t)) for a, t in self.lines)
        target = {a: int(found[1], 16) for a, found in branches if found}
        after = {a: b for (a, _), (b, _) in zip(self.lines, self.lines[1:], strict=False)}
        ends = {a for a, t in self.lines if a in target or re.match(r"(?:@!?U?P\d\s+)?EXIT", t)}
        starts = {self.lines[0][0], *target.values(), *(after[a] for a in ends if a in after)}
        blocks: list[Block] = []
        for address, text in self.lines:
            if address in starts or not blocks:
                if blocks and not blocks[-1].to:
                    blocks[-1].to.append(address)
                blocks.append(Block(address))
            blocks[-1].code.append(text)
            blocks[-1].last = address
            conditional = text.startswith("@") or re.search(r"BRA\S* !?U?P\d", text) is not None
            if address in target:
                blocks[-1].to = [target[address]] + ([after[address]] if conditional else [])
            elif address in ends:
                blocks[-1].to = [after[address]] if conditional else [-1]
        blocks = reachable(blocks)
        spans = {(to, a) for a, to in target.items() if to < a and any(b.first <= a <= b.last for b in blocks)}
        loops = [
            Loop(self.lines[0][0], self.lines[-1][0]),
            *(Loop(*s) for s in sorted(spans, key=lambda s: s[0] - s[1])),
        ]
        for loop in loops[1:]:
            around = min(
                (
                    o
                    for o in loops
                    if o is not loop
                    and o.first <= loop.first
                    and loop.last <= o.last
                    and (o.first, o.last) != (loop.first, loop.last)
                ),
                key=lambda o: o.last - o.first,
            )
            around.inside.append(loop)
        for block in blocks:
            home = min((o for o in loops if o.first <= block.first <= o.last), key=lambda o: o.last - o.first)
            home.own.append(block)
        for loop in loops:
            loop.inside.sort(key=lambda i: i.first)
        return loops[0]


def disassembled(path: Path, architecture: str) -> str:
    """The machine code of a library or an object, and what its functions take, as cuobjdump writes them."""
    command = [cuobjdump(), "-arch", architecture, "-sass", "--dump-resource-usage", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernels_in(text: str, architecture: str) -> list[Kernel]:
    """The direct form's kernels in machine code as :func:`disassembled` gives it."""
    kernels: dict[str, Kernel] = {}
    usage, now = None, None
    for line in text.splitlines():
        if match := re.match(r"\s+Function : (\S+)", line):
            now = kernels.setdefault(match[1], Kernel(architecture, match[1]))
        elif match := re.match(r"\s*Function (\S+):", line):
            usage = kernels.setdefault(match[1], Kernel(architecture, match[1]))
        elif "REG:" in line and usage is not None:
            use = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            usage.registers, usage.spills = use["REG"], use["STACK"] + use["LOCAL"]
        elif now is not None and (match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line)):
            now.lines.append((int(match[1], 16), match[2]))
    return [kernel for kernel in kernels.values() if kernel.tile and kernel.lines]


def read(paths: Iterable[Path], architecture: str) -> list[Kernel]:
    """The direct form's kernels in libraries or objects."""
    return [kernel for path in paths for kernel in kernels_in(disassembled(path, architecture), architecture)]


SHARED_OF_ALL = {"sm_80": 164 << 10, "sm_90": 228 << 10}  # bytes of a multiprocessor


@dataclass(frozen=True)
class Resources:
    """What a block of one kernel takes, but for the shared memory that its launch asks for."""

    architecture: str
    name: str
    threads: int  # at most
    registers: int  # a thread
    shared: int  # bytes
    spills: int  # bytes a thread of stack and of local memory

    @property
    def family(self) -> str:
        """``gram_norm_kernel`` of ``_ZN4engm4cuda16gram_norm_kernel...``."""
        found = re.search(r"cuda(?:12_GLOBAL__N_1)?(\d+)(\w+)", self.name)
        if found is None:
            raise ValueError(f"No kernel of engm is called {self.name}.")
        return found[2][: int(found[1])]

    def resident_warps(self, shared: int = 0) -> int:
        """How many of a multiprocessor's 64 warps its blocks fill, if each asks for so much shared memory.

        There are 65536 registers, which a warp takes 256 at a time.
        """
        warps = -(-self.threads // 32)
        of_registers = 65536 // (-(-32 * self.registers // 256) * 256 * warps)
        of_shared = SHARED_OF_ALL[self.architecture] // max(self.shared + shared, 1)
        return warps * min(of_registers, of_shared, 64 // warps, 32)


def resources(paths: Iterable[Path], architecture: str) -> list[Resources]:
    """What every kernel in libraries or objects takes."""
    found: list[Resources] = []
    for path in paths:
        command = [cuobjdump(), "-arch", architecture, "-elf", "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # A section of attributes a kernel, and a line of usage behind its name.
        threads = {
            section[1]: int(section[2], 16)
            for section in re.finditer(
                r"^\.nv\.info\.(\S+)\n(?:(?!\.).*\n)*?\s*Attribute:\s*EIATTR_MAX_THREADS\n.*\n\s*Value:\s*0x(\w+)",
                text,
                re.MULTILINE,
            )
        }
        for usage in re.finditer(r"^ *Function (\S+):\n(.*REG:.*)$", text, re.MULTILINE):
            use = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", usage[2])}
            spills = use["STACK"] + use["LOCAL"]
            found.append(Resources(architecture, usage[1], threads[usage[1]], use["REG"], use["SHARED"], spills))
    return found


def by_kind(loop: Loop) -> dict[str, list[Loop]]:
    """The loops inside by what they do, those for x before those for gy."""
    found: dict[str, list[Loop]] = {}
    for inside in loop.inside:
        found.setdefault(inside.kind, []).append(inside)
    return found


def all_loops(loop: Loop) -> Iterator[Loop]:
    """A loop and those inside."""
    yield loop
    for inside in loop.inside:
        yield from all_loops(inside)
