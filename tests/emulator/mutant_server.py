"""Runs cases on mutants, each in a process of its own: a mutant may crash or never end.

Started by test_mutations.py with the library as argument; takes ``number case case ...`` a line and answers with a line
of JSON: what caught the mutant, or null.
"""

import ctypes
import json
import os
import signal
import sys

import torch
from emulator.mutation_cases import CASES

SEEDS = range(4)
SECONDS = 60  # a case takes a fraction of one


def run(ops, library, number: int, names: list[str]) -> str | None:
    """Every case under every seed until one fails."""
    library.set_mutant(number)
    for seed in SEEDS:
        os.environ["ENGM_EMULATOR_SEED"] = str(seed)
        for name in names:
            torch.manual_seed(0)
            try:
                CASES[name](ops, library)
            except (RuntimeError, AssertionError) as error:
                return f"{name}, seed {seed}: {str(error).strip()[:400]}"
    return None


def in_a_child(ops, library, number: int, names: list[str]) -> str | None:
    """The same in a fork, with crashes and endless loops told as such."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(SECONDS)
        os.write(writing, json.dumps(run(ops, library, number, names)).encode())
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
    for line in sys.stdin:
        number, *names = line.split()
        sys.stdout.write(json.dumps(in_a_child(ops, library, int(number), names)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
