"""Compiles the CUDA kernels for the CPU: csrc/cuda with g++ and the emulator, as ``torch.ops.engm_emulated``.

Objects are kept in build/emulator and made again when their source, a header that they include, the flags or the
compiler change, so that a second run compiles nothing. Several processes may build at once.

    PYTHONPATH=tests python -m emulator.build      builds everything and prints the library's path
"""

import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulator"
RUNTIME = ("emulator.cpp", "fiber.cpp", "undefined_behaviour.cpp", "warp_matrix.cpp")
COMPILER = os.environ.get("CXX", "g++")
WARNINGS = ("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function")
FLAGS = ("-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-g0", "-ffp-contract=off", "-DENGM_EMULATOR", *WARNINGS)
SANITIZERS = ("-fsanitize=alignment,bounds", "-fno-sanitize-recover=alignment,bounds")
# What binds to Python what it sees of the extension.
OF_PYTHON = (
    "ops.cpp",
    "add_gradients.cpp",
    "cost_model_bindings.cpp",
    "calls.cpp",
    "captured_calls.cpp",
    "frozen_statistics.cpp",
    "gradient_prints.cpp",
    "row_owners.cpp",
    "graph_records.cpp",
    "program.cpp",
    "recurrence.cpp",
    "unchanged.cpp",
    "graph_walk.cpp",
    "trust_bindings.cpp",
)
KEPT_OBJECTS = 4  # of one source, for going back and forth between versions


@dataclass(frozen=True)
class Unit:
    """A source file and how it is compiled."""

    source: Path
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """Tells units of one file name apart."""
        which = hashlib.sha256("\0".join((str(self.source), *self.flags)).encode()).hexdigest()[:8]
        return f"{self.source.stem}{self.source.suffix.replace('.', '-')}-{which}"


def kernel_unit(source: Path, kernels: Path = CSRC / "cuda") -> Unit:
    """A .cu, or a C++ file without torch, with the kernels' headers from that directory."""
    include = (f"-I{kernels}", f"-I{EMULATOR}")
    return Unit(source, ("-x", "c++", "-std=c++17", "-O1", *include, *FLAGS, *SANITIZERS))


def runtime_units() -> list[Unit]:
    """The emulator itself; the fragments' arithmetic is worth optimizing."""
    return [Unit(EMULATOR / name, ("-std=c++17", "-O3", f"-I{EMULATOR}", *FLAGS)) for name in RUNTIME]


def torch_unit(source: Path) -> Unit:
    """A file that includes torch's headers."""
    from torch.utils.cpp_extension import include_paths

    include = (f"-I{EMULATOR}", f"-I{CSRC}", *(f"-isystem{path}" for path in include_paths()))
    return Unit(source, ("-std=c++20", "-O0", *include, *FLAGS))


def operator_units() -> list[Unit]:
    """Everything that the operators need: bindings, checks, kernels and the emulator."""
    bindings = [EMULATOR / "operators.cpp", *(CSRC / "cuda").glob("*.cpp")]
    bindings += [path for path in CSRC.glob("*.cpp") if path.name not in OF_PYTHON]
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    return [torch_unit(path) for path in sorted(bindings)] + [kernel_unit(path) for path in kernels] + runtime_units()


@functools.cache
def compiler_version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def key(unit: Unit, dependencies: Iterable[Path]) -> str:
    """What an object depends on, as a hash of contents."""
    state = hashlib.sha256("\0".join((compiler_version(), *unit.flags)).encode())
    for path in (unit.source, *sorted(dependencies)):
        state.update(b"\0" + str(path).encode() + b"\0")
        state.update(path.read_bytes() if path.exists() else b"missing")
    return state.hexdigest()[:20]


def read_dependencies(listing: Path) -> list[Path] | None:
    """The repository's files that the last compilation included; None before the first."""
    if not listing.exists():
        return None
    words = listing.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return sorted({Path(word).resolve() for word in words if Path(word).resolve().is_relative_to(ROOT)})


def run_compiler(command: Sequence[str], what: str) -> None:
    """Raises with the compiler's words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"The emulator's build failed at {what}:\n{' '.join(command)}\n{done.stdout}{done.stderr[-12000:]}"
        )


def compile_unit(unit: Unit) -> Path:
    """The unit's object file, compiled if need be."""
    listing = BUILD / f"{unit.name}.d"
    with FileLock(BUILD / f"{unit.name}.lock"):
        dependencies = read_dependencies(listing)
        if dependencies is not None:
            known = BUILD / f"{unit.name}-{key(unit, dependencies)}.o"
            if known.exists():
                known.touch()
                return known
        scratch = BUILD / f"{unit.name}.new.o"
        command = [COMPILER, *unit.flags, "-MMD", "-MF", str(listing), "-c", str(unit.source), "-o", str(scratch)]
        run_compiler(command, str(unit.source))
        made = BUILD / f"{unit.name}-{key(unit, read_dependencies(listing) or [])}.o"
        scratch.replace(made)
        old = sorted(BUILD.glob(f"{unit.name}-*.o"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in old[KEPT_OBJECTS:]:
            path.unlink(missing_ok=True)
        return made


def build_library(name: str, units: Sequence[Unit], with_torch: bool = True) -> Path:
    """A shared library of the units; where two define one inline function, the first one's is taken."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / f"{name}.lock"):
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_unit, units))
        which = hashlib.sha256("\0".join(map(str, objects)).encode()).hexdigest()[:16]
        library = BUILD / f"lib{name}-{which}.so"
        if not library.exists():
            for old in sorted(BUILD.glob(f"lib{name}-*.so"), key=lambda path: path.stat().st_mtime)[:-2]:
                old.unlink(missing_ok=True)
            scratch = BUILD / f"{name}.new.so"
            run_compiler([COMPILER, "-shared", *map(str, objects), *link_flags(with_torch), "-o", str(scratch)], name)
            scratch.replace(library)
    return library


def link_flags(with_torch: bool) -> list[str]:
    """Torch's libraries, and an error for anything that is still undefined."""
    flags = ["-Wl,-z,defs", "-pthread"]
    if with_torch:
        from torch.utils.cpp_extension import library_paths

        flags += [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-ltorch", "-lc10"]
    return flags


def build_operators() -> Path:
    """The library that registers ``torch.ops.engm_emulated``."""
    return build_library("engm_emulated", operator_units())


if __name__ == "__main__":
    sys.stdout.write(f"{build_operators()}\n")
