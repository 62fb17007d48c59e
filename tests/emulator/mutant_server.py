"""Runs cases on mutants, each in a process of its own: a mutant may crash or never end.

Started by test_mutations.py with the library as argument; takes ``task number case case ...`` a line and answers with a
line of JSON: what the task found, or null. Tasks are :func:`caught` and :func:`routed_around`.
"""

import ctypes
import gc
import json
import os
import signal
import sys

import torch
from emulator.mutation_cases import CASES

SEEDS = range(4)
SEEDS_OF_TRIALS = range(2)  # trials take longer than cases, which see a kernel's results under all seeds
SECONDS = 60  # a case takes a fraction of one


def caught(ops, library, number: int, names: list[str]) -> str | None:
    """Every case under every seed until one fails: what failed."""
    library.put_on_probation(0)
    library.set_mutant(number)
    for seed in SEEDS:
        os.environ["ENGM_EMULATOR_SEED"] = str(seed)
        if (failed := first_failure(ops, library, names)) is not None:
            return f"{failed[0]}, seed {seed}: {failed[1]}"
    return None


def routed_around(ops, library, number: int, names: list[str]) -> dict[str, str | None]:
    """Every case under seed after seed with kernels on probation, until one is distrusted.

    Returns:
        ``wrong``: the case whose result was wrong all the same; ``distrusted``: the kernel that was noticed, and why.
    """
    library.verdicts.restype = ctypes.c_char_p
    library.set_mutant(number)
    for seed in SEEDS_OF_TRIALS:
        os.environ["ENGM_EMULATOR_SEED"] = str(seed)
        library.put_on_probation(1)
        failed = first_failure(ops, library, names)
        verdicts = library.verdicts().decode().splitlines()
        distrusted = next((line for line in verdicts if not line.endswith("\ttrusted")), None)
        if failed or distrusted:
            return {"wrong": failed and f"{failed[0]}, seed {seed}: {failed[1]}", "distrusted": distrusted}
    return {"wrong": None, "distrusted": None}


def first_failure(ops, library, names: list[str]) -> tuple[str, str] | None:
    """The first of the cases that fails, and how."""
    for name in names:
        torch.manual_seed(0)
        try:
            CASES[name](ops, library)
        except (RuntimeError, AssertionError) as error:
            return name, str(error).strip()[:400]
    return None


TASKS = {task.__name__: task for task in (caught, routed_around)}


def in_a_child(ops, library, task: str, number: int, names: list[str]):
    """The same in a fork, with crashes and endless loops told as such."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(SECONDS)
        os.write(writing, json.dumps(TASKS[task](ops, library, number, names)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(answer) if answer else f"ended by {signal.Signals(os.WTERMSIG(status)).name}"


def main() -> None:
    """Answers until the input ends."""
    torch.set_num_threads(1)  # before the forks
    torch.ops.load_library(sys.argv[1])
    ops, library = torch.ops.engm_emulated, ctypes.CDLL(sys.argv[1])
    library.put_on_probation(0)
    # Before the forks too: torch imports five hundred modules when an operator is first called, which takes longer
    # than most cases do.
    first_failure(ops, library, ["many_tiles"])
    gc.freeze()
    for line in sys.stdin:
        task, number, *names = line.split()
        sys.stdout.write(json.dumps(in_a_child(ops, library, task, int(number), names)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
