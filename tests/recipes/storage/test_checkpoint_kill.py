"""`kill -9` at any moment: a whole, recent checkpoint is there, and the lock is free."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engm.recipes.storage.checkpoint import CheckpointStore
from engm.recipes.storage.folder_lock import locked

# Importing torch takes seconds, so one process does it and forks the victims.
NURSERY = """
import os, signal, sys, time
from pathlib import Path
import torch
from engm.recipes.storage.checkpoint import CheckpointStore
from engm.recipes.storage.folder_lock import locked

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def die_before_change(number):
    left = [number]
    def hook(event, arguments):
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def save_on_and_on(store):
    with locked(store.folder):
        found = store.latest()
        number = 0 if found is None else found[1]["number"]
        while True:
            number += 1
            tree = {"number": number, "weights": torch.full((300,), float(number))}
            store.save(f"step-{number:08}", tree)
            store.save("best-00000000", tree)
            store.prune()
            say("saved", number)

def hold(store):
    with locked(store.folder):
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        say("worker", worker)
        time.sleep(60)

for line in sys.stdin:
    folder, what, number = line.split()
    victim = os.fork()
    if victim == 0:
        store = CheckpointStore(Path(folder))
        say("pid", os.getpid())
        if int(number):
            die_before_change(int(number))
        {"save": save_on_and_on, "hold": hold}[what](store)
    say("ended", os.waitpid(victim, 0)[1])
"""


class Nursery:
    """Starts victims; each line that they write is a word and a number."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, folder: Path, what: str, die_before: int = 0) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{folder} {what} {die_before}\n")
        self._process.stdin.flush()
        return self.read("pid")[-1]

    def read(self, word: str) -> list[int]:
        """Numbers of the lines up to the next one of ``word``."""
        assert self._process.stdout is not None
        numbers = []
        for line in self._process.stdout:
            found, number = line.split()
            numbers.append(int(number))
            if found == word:
                return numbers
        raise AssertionError(f"the nursery ended before saying {word}")

    def ended(self) -> list[int]:
        """What was acknowledged until the end, which must have been by SIGKILL."""
        *saved, status = self.read("ended")
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        return saved

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


class Seen:
    """The newest number of each series, as far as it was seen or acknowledged: there is no going back behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numbers = {"step-": 0, "best-": 0}

    def check(self, saved: list[int]) -> None:
        """After a death, with the numbers that were acknowledged before it: one more may have been written."""
        at_most = self.numbers["step-"] + len(saved) + 1
        store = CheckpointStore(self.folder)
        for prefix, before in self.numbers.items():
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = store.latest(prefix)
            here = 0 if found is None else found[1]["number"]
            assert max([before, *saved]) <= here <= at_most, prefix
            assert found is None or found[1]["weights"].tolist() == [here] * 300
            self.numbers[prefix] = here
        for folder in self.folder.glob("[a-z]*-*"):
            store.load(folder.name)  # an older one that is there at all is whole too


def test_killed_at_random_moments(nursery: Nursery, tmp_path: Path) -> None:
    generator = random.Random(0)
    seen = Seen(tmp_path)
    for _ in range(20):
        victim = nursery.start(tmp_path, "save")
        saved = nursery.read("saved")
        time.sleep(generator.uniform(0, 0.04))
        os.kill(victim, signal.SIGKILL)
        seen.check(saved + nursery.ended())
    assert min(seen.numbers.values()) >= 20


def test_killed_before_each_change_of_the_disk(nursery: Nursery, tmp_path: Path) -> None:
    """In turn before every file opened for writing, folder made, renaming and removal of more than one round."""
    left_behind = {"being replaced": 0, "being written": 0}
    seen = Seen(tmp_path)
    for name in ("step-00000001", "best-00000000"):
        CheckpointStore(tmp_path).save(name, {"number": 1, "weights": torch.ones(300)})
    for change in range(1, 36):
        nursery.start(tmp_path, "save", die_before=change)
        saved = nursery.ended()
        left = [path.name for path in tmp_path.iterdir()]
        replacing = "best-00000000" not in left and any(name.startswith(".old-best") for name in left)
        left_behind["being replaced"] += replacing
        left_behind["being written"] += any(name.startswith(".tmp") for name in left)
        seen.check(saved)
    assert min(seen.numbers.values()) > 10
    assert min(left_behind.values()) >= 1, left_behind


def test_one_process_at_a_time_and_the_kernel_unlocks(nursery: Nursery, tmp_path: Path) -> None:
    victim = nursery.start(tmp_path, "hold")
    worker = nursery.read("worker")[-1]
    with pytest.raises(RuntimeError, match=f"another process is training in {tmp_path}"), locked(tmp_path):
        pass
    os.kill(victim, signal.SIGKILL)
    nursery.ended()
    try:
        with locked(tmp_path):  # though the worker that it forked is alive
            os.kill(worker, 0)
            with pytest.raises(RuntimeError, match="another process"), locked(tmp_path):
                pass
        with locked(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
