"""Every fault that mutations.py puts into the kernels shows in a test."""

import json
import os
import subprocess
import sys

import pytest
from emulator.build import ROOT
from emulator.mutation_cases import CASES
from emulator.mutation_table import CASES as CASES_OF_FILE
from emulator.mutation_table import MUTATIONS, NOT_OF_BINDINGS, OF_BINDINGS
from emulator.mutations import Mutation, OutOfDateError, build_mutants, is_up_to_date, mutate

NO_MUTANT = 0


@pytest.fixture(scope="session")
def ask():
    """What a task of the mutants' server finds with a mutant and cases."""
    command = [sys.executable, "-m", "emulator.mutant_server", str(build_mutants(MUTATIONS))]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as server:

        def answer(task, number, names):
            server.stdin.write(" ".join((task, str(number), *names)) + "\n")
            server.stdin.flush()
            line = server.stdout.readline()
            assert line, "the server has ended"
            return json.loads(line)

        yield answer
        server.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_without_mutations_all_cases_pass(ask, name):
    assert ask("caught", NO_MUTANT, [name]) is None


@pytest.mark.slow
@pytest.mark.parametrize("mutation", [pytest.param(m, id=f"{m.file}: {m.name}") for m in MUTATIONS])
def test_mutations_are_caught(ask, mutation):
    assert is_up_to_date(mutation), f"{mutation.file} has no '{mutation.text}': bring mutation_table.py up to date"
    caught = ask("caught", mutation.number, CASES_OF_FILE[mutation.file])
    if mutation.harmless:
        assert caught is None, f"declared harmless ({mutation.harmless}), but caught by {caught}"
    else:
        assert caught is not None, "no case noticed"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_without_mutations_all_kernels_are_trusted(ask, name):
    assert ask("routed_around", NO_MUTANT, [name]) == {"wrong": None, "distrusted": None}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", [pytest.param(m, id=f"{m.file}: {m.name}") for m in MUTATIONS if not m.harmless])
def test_mutations_are_noticed_on_first_use_and_routed_around(ask, mutation):
    names = OF_BINDINGS.get(mutation.file, CASES_OF_FILE[mutation.file])
    found = ask("routed_around", mutation.number, [name for name in names if name not in NOT_OF_BINDINGS])
    if isinstance(found, str):  # the process ended in the kernel's trial, and no number came of it
        return
    assert found["wrong"] is None
    assert found["distrusted"] is not None, "the kernel was trusted"


def test_both_versions_are_written():
    source = "#pragma once\nf(); x = a + b; f();"
    statement = Mutation("left out", "x.cuh", "f();", "", occurrence=1)
    expression = Mutation("less", "x.cuh", "a + b", "a - b")
    again = Mutation("twice", "x.cuh", "f();", "f(); f();", occurrence=1)
    assert mutate(source, [statement, expression, again]).split("\n")[-1] == (
        f"f(); x = (::emulator::mutant == {expression.number} ? (a - b) : (a + b)); "
        f"{{ if (::emulator::mutant == {again.number}) {{ f(); f(); }} else "
        f"{{ {{ if (::emulator::mutant == {statement.number}) {{  }} else {{ f(); }} }} }} }}"
    )
    with pytest.raises(OutOfDateError, match=r"'gone': x.cuh has no 'g\(\);'"):
        mutate(source, [Mutation("gone", "x.cuh", "g();", "")])
    with pytest.raises(RuntimeError, match="overlap"):
        mutate(source, [expression, Mutation("wider", "x.cuh", "x = a + b;", "x = 0;")])
