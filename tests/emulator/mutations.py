"""Faults put into the kernels, to see that the tests would notice them.

All mutations are compiled into one library, each behind a switch: a statement becomes ``if (mutant == 7) {the fault}
else {the original}``, an expression ``(mutant == 7 ? (fault) : (original))``. So one build serves them all, and the
kernels with every switch off are checked as well. Barriers and waits are found by themselves; mutation_table.py has the
rest, and says which cannot be caught and why.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emulator.build import BUILD, CSRC, EMULATOR, Unit, build_library, kernel_unit, operator_units
from filelock import FileLock

KERNELS = CSRC / "cuda"
# Instantiations that stay as they are: what they would add are other lines of mma.cuh, checked by themselves.
UNTOUCHED = ("_float16.cu", "gemm_norm_tf32.cu", "conv_norm_float32.cu")


class OutOfDateError(RuntimeError):
    """The kernels have changed, the table has not."""


def without_comments(source: str) -> str:
    """The source with blanks in place of its comments."""
    return re.sub(r"//[^\n]*", lambda comment: " " * len(comment[0]), source)


@dataclass(frozen=True)
class Mutation:
    """Replaces the `occurrence`-th `text` of a file, from 0: a statement if it ends in ;, else an expression."""

    name: str
    file: str
    text: str
    replacement: str
    occurrence: int = 0
    harmless: str = ""  # why no test can see it

    @property
    def number(self) -> int:
        """The same whatever else is in the table, so that objects stay valid."""
        return int(hashlib.sha256(f"{self.file}:{self.name}".encode()).hexdigest()[:7], 16) + 1

    def span(self, source: str) -> tuple[int, int]:
        """Where it is in the file, comments aside."""
        at, code = -1, without_comments(source)
        for _ in range(self.occurrence + 1):
            at = code.find(self.text, at + 1)
            if at < 0:
                raise OutOfDateError(f"Mutation '{self.name}': {self.file} has no '{self.text}'.")
        return at, at + len(self.text)

    def switched(self, original: str) -> str:
        """Both versions, behind a switch."""
        condition = f"::emulator::mutant == {self.number}"
        if self.text.endswith(";"):
            return f"{{ if ({condition}) {{ {self.replacement} }} else {{ {original} }} }}"
        return f"({condition} ? ({self.replacement}) : ({original}))"


def barriers_and_waits(file: Path, harmless: dict[str, str]) -> list[Mutation]:
    """Every barrier of a file left out, every wait one group short."""
    source = without_comments(file.read_text())
    found = []
    for i, call in enumerate(re.finditer(r"__sync(threads|warp)\(\);", source)):
        earlier = source[: call.start()].count(call[0])
        found.append(Mutation(f"barrier {i} left out", file.name, call[0], "", earlier))
    for i, call in enumerate(re.finditer(r"copy_async_wait<([^;]*)>\(\);", source)):
        earlier = source[: call.start()].count(call[0])
        one_short = f"copy_async_wait<{call[1]} + 1>();"
        found.append(Mutation(f"wait {i} one group short", file.name, call[0], one_short, earlier))
    known = {f"{file.name}: {m.name}" for m in found}
    if unknown := {key for key in harmless if key.startswith(f"{file.name}: ")} - known:
        raise OutOfDateError(f"The mutations {sorted(unknown)} are not there any more.")
    return [Mutation(**(vars(m) | {"harmless": harmless.get(f"{file.name}: {m.name}", "")})) for m in found]


def mutate(source: str, mutations: Iterable[Mutation]) -> str:
    """The source with all of them; those of one place are nested."""
    at: dict[tuple[int, int], list[Mutation]] = {}
    for mutation in mutations:
        at.setdefault(mutation.span(source), []).append(mutation)
    places = sorted(at)
    for first, second in itertools.pairwise(places):
        if second[0] < first[1]:
            raise RuntimeError(f"Mutations overlap at '{source[second[0] : first[1]]}'.")
    for begin, end in reversed(places):
        text = source[begin:end]
        for mutation in at[begin, end]:
            text = mutation.switched(text)
        source = source[:begin] + text + source[end:]
    return source.replace("#pragma once\n", '#pragma once\n\n#include "mutant.h"\n', 1)


def is_up_to_date(mutation: Mutation) -> bool:
    """Whether the kernels still have the text that a mutation replaces."""
    try:
        return bool(mutation.span((KERNELS / mutation.file).read_text()))
    except OutOfDateError:
        return False


def write_mutants(mutations: Sequence[Mutation], tree: Path) -> None:
    """The kernels' directory with all mutations in it; files that are right already stay untouched."""
    tree.mkdir(parents=True, exist_ok=True)
    sources = {path.name: path.read_text() for path in KERNELS.iterdir() if path.suffix in (".cu", ".cuh", ".h")}
    for path in tree.iterdir():
        if path.name not in sources:
            path.unlink()
    for name, source in sources.items():
        of_file = [m for m in mutations if m.file == name]
        text, path = mutate(source, of_file) if of_file else source, tree / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def build_mutants(mutations: Sequence[Mutation]) -> Path:
    """One library with all that are up to date; objects of untouched kernels come from the ordinary build."""
    tree = BUILD / "mutants"
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "mutants_tree.lock"):
        write_mutants([m for m in mutations if is_up_to_date(m)], tree)
        touched = [path for path in sorted(tree.glob("*.cu")) if not path.name.endswith(UNTOUCHED)]
        units: list[Unit] = [
            kernel_unit(path, tree) for path in (EMULATOR / "fragments.cpp", EMULATOR / "gram_cases.cpp", *touched)
        ]
        units.append(kernel_unit(EMULATOR / "mutant.cpp", tree))
        # The mutants first: of an inline function that both have, the linker takes theirs.
        names = {path.name for path in touched}
        return build_library("mutants", units + [unit for unit in operator_units() if unit.source.name not in names])
