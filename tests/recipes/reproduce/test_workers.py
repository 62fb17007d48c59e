"""Several cells at once: what happens to the processes when something goes wrong."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engm.recipes.reproduce import Request, analysis, budget
from engm.recipes.reproduce.workers import at_once


def test_an_error_of_one_cell_ends_all_processes(tmp_path: Path) -> None:
    cells = analysis("table5").cells(Request(budget("smoke"), {"data": str(tmp_path / "nowhere.npz")}, (0,)))
    before = set(multiprocessing.active_children())
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        at_once(cells, tmp_path / "runs", torch.device("cpu"), 2, lambda record, done: None)
    assert not set(multiprocessing.active_children()) - before


def children(pid: int) -> set[int]:
    """Of a process, by what the kernel lists."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.add(int(entry.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_killed_command_leaves_no_process_behind_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engm.recipes", "reproduce", "fig2", "--budget", "smoke", "--jobs", "2"]
    command += ["--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("runs/*/config.toml"))) < 1 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before a cell began"
        time.sleep(0.05)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert workers
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fig2" / "results.json").is_file()
