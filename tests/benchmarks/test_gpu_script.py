"""The script of the GPU benchmarks, with a stub in Python's place: nothing that fails or hangs costs another step."""

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu/run.sh"
# What the script runs, answered by the stage's name; a stage leaves a file, as the real ones leave their JSON.
STUB = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
  *sys.executable*) exec echo "$0" ;;
  *"import xdist"* | *"import pytest_timeout"*) exit 1 ;;
  *"setup.py"*) exit "${BUILD_STATUS:-0}" ;;
  *"--stages fails"*) exit 1 ;;
  *"--stages hangs"*) (sleep 60 &) ; sleep 60 ;;  # one child outlives it
  *"--tools memcheck"*) exit 1 ;;
esac
exit 0
"""


@pytest.fixture
def script(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(*arguments, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        done = subprocess.run(
            ["bash", str(SCRIPT), str(tmp_path / "out"), *arguments],
            env=os.environ | {"PYTHON": str(stub), "CALLS": str(calls)} | environment,
            capture_output=True, text=True, check=False, timeout=100,
        )  # fmt: skip
        outcomes = tmp_path / "out/outcomes.jsonl"
        lines = outcomes.read_text().splitlines() if outcomes.exists() else []
        return done, {row["step"]: row["status"] for row in map(json.loads, lines)}, calls.read_text()

    return run


def test_valid_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_a_failing_and_a_hanging_stage_cost_no_other(script):
    done, status, _ = script("--phase", "speed", STAGES="fails:20 hangs:5:1 works:20 last:5:1")
    assert done.returncode == 1
    assert status == {
        "build": "0", "what was built": "0", "self_test": "0", "fails": "1", "hangs": "124",
        "hangs, the rest": "no time left", "works": "0", "last": "0",
    }  # fmt: skip
    assert done.stdout.splitlines()[-1].startswith("on a card: ")


def test_the_sanitizers_are_steps_of_their_own_and_racecheck_is_the_last(script):
    done, status, calls = script("--phase", "sanitize", SKIP_BUILD="1")
    assert done.returncode == 1
    assert list(status.items())[2:] == [("memcheck", "1"), ("synccheck", "0"), ("racecheck", "0")]
    assert "setup.py" not in calls
    assert "make" not in calls


def test_nothing_runs_after_a_build_that_failed(script):
    done, status, calls = script("--phase", "check", BUILD_STATUS="1")
    assert done.returncode == 1
    assert status == {"build": "1"}
    assert "pytest" not in calls


def test_every_stage_says_when_no_time_is_left(script):
    _, status, calls = script("--phase", "speed", SECONDS_ALL="30", STAGES="one:20 two:20:40")
    assert status["two"] == "no time left"
    assert "--stages two" not in calls


@pytest.mark.parametrize("phase", ["training", "runs"])
def test_data_is_asked_for_before_anything_is_built(script, phase):
    done, status, _ = script("--phase", phase, DATA="")
    assert done.returncode == 2
    assert "set DATA" in done.stderr
    assert not status


def test_an_unknown_phase(script):
    done, _, _ = script("--phase", "sped")
    assert done.returncode == 2
    assert "check sanitize speed recorded training runs" in done.stderr


def test_a_rehearsal_takes_the_phases_asked_for(script, tmp_path):
    data = tmp_path / "data.npz"
    data.write_bytes(b"")
    done, _, calls = script("--rehearse", PHASES="check runs", DATA=str(data))
    assert done.returncode == 0, done.stdout
    assert "check: status 0, 0 failing cases" in done.stdout
    assert "--stages runs --data" in calls
    assert "--device fake --tiny" in calls
    assert done.stdout.splitlines()[-1].startswith("on a card: ")
