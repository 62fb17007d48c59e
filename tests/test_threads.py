"""The CPU operators on two threads: both take part, the numbers are right, and the same on every run."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import threaded_operators
import torch
from threaded_operators import CASES

import engm

TESTS = Path(__file__).parent


@functools.cache
def found_in_a_process_of_two_threads() -> Any:
    """What tests/threaded_operators.py prints.

    Waiting threads sleep there, so that a thread which only waits spends no processor time.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(Path(engm.__file__).parents[1])]),
    }
    command = [sys.executable, threaded_operators.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_thread_clocks = pytest.mark.skipif(sys.platform != "linux", reason="clocks of single threads are Linux's")


@needs_thread_clocks
@pytest.mark.parametrize("name", CASES)
def test_a_second_thread_does_its_share(name):
    """An extension without ``-fopenmp`` gives one thread everything; half is less what the caller does around it."""
    first, second, *_ = [*found_in_a_process_of_two_threads()["shares"][name], 0.0]
    assert second > 0.2, f"one thread did {first:.0%} of the work"


@needs_thread_clocks
def test_there_is_one_openmp_runtime():
    """Torch brings its own; a second one, linked to the extension, would have threads of its own."""
    found = found_in_a_process_of_two_threads()
    assert len(found["runtimes"]) == (1 if found["backend"] == "OpenMP" else 0), found


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", CASES)
def test_two_threads_give_the_reference(name):
    case = CASES[name]()
    for got, want in zip(tensors(case.run()), tensors(case.expected()), strict=True):
        # Sums of mixed sign: the error is relative to the largest.
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", CASES)
def test_two_threads_give_the_same_bits_on_every_run(name):
    case = CASES[name]()
    first = tensors(case.run())
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, tensors(case.run()), strict=True))
    if case.same_on_one_thread:
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(first, tensors(case.run()), strict=True))
