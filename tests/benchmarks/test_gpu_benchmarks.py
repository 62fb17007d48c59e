"""The GPU benchmarks rehearsed on the CPU: every stage runs, and a failing case costs nothing but itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu.record import Absent, DeviceLostError, Record
from gpu.timing import Bench

ROOT = Path(__file__).parents[2]
STAGES = ["self_test", "ceilings", "kernels", "steps", "pgd", "memory", "profile", "training", "runs"]
CPU = torch.device("cpu")


def problems(case):
    """Failures of a case or of one of its contenders."""
    rows = [case, *case.get("contenders", {}).values()]
    return [f"{case['case']}: {row['error']}" for row in rows if "error" in row]


@pytest.mark.slow
def test_every_stage_runs(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (32, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(32) % 10
    data = tmp_path / "images.npz"
    np.savez(data, x_train=images[:24], y_train=labels[:24], x_test=images[24:], y_test=labels[24:])
    command = [sys.executable, str(ROOT / "benchmarks/gpu/run.py"), "--device", "fake", "--tiny"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--stages", ",".join(STAGES), "--data", str(data), "--runs", "runs"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["stages"]) == STAGES
    for name, stage in found["stages"].items():
        assert stage["cases"], name
        assert not [problem for case in stage["cases"] for problem in problems(case)]
    assert found["machine"]["torch"] == torch.__version__
    kernels = found["stages"]["kernels"]["cases"]
    assert max(case.get("norm error", 0) for case in kernels if "bf16" not in case["case"]) < 1e-4
    steps = found["stages"]["steps"]["cases"][0]["contenders"]
    assert steps["sgd"]["ratio"] == 1
    assert steps["engm"]["ms"] > 0
    assert steps["engm"]["peak megabytes"] == 2, "the faked allocator was not asked"
    assert kernels[0]["repeats"] == 2, "the faked events were not used"
    assert found["stages"]["runs"]["cases"][0]["finished"]
    assert found["stages"]["training"]["cases"][0]["fidelity"].keys() == {"engm-borrowed", "engm-own"}
    assert "## kernels" in (tmp_path / "gpu.md").read_text()
    assert not (tmp_path / "running.txt").exists()


@pytest.mark.slow
def test_recorded_steps_by_their_backends(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu/run.py"), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--stages", "backends"], capture_output=True, text=True, check=False, cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads((tmp_path / "gpu.json").read_text())["stages"]["backends"]["cases"]
    assert not [problem for case in cases for problem in problems(case)]
    assert [(case["norm"], case["attack_steps"]) for case in cases] == [
        *(("group", 0), ("batch", 0), ("group", 2), ("batch", 2)),
        ("group", 0),
    ]
    assert list(cases[0]["contenders"]) == ["msgd, by hand", "msgd, replay", "engm, by hand", "engm, replay"]
    assert cases[-1]["contenders"].keys() >= {"msgd, inductor", "engm, inductor"}


@pytest.mark.slow
def test_recorded_steps_of_every_method(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu/run.py"), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--stages", "recorded"], capture_output=True, text=True, check=False, cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    attacked, plain = json.loads((tmp_path / "gpu.json").read_text())["stages"]["recorded"]["cases"]
    assert not [problem for case in (attacked, plain) for problem in problems(case)]
    assert len(attacked["contenders"]) == 5
    assert plain["contenders"]["msgd"]["ratio"] == 1


def fails():
    raise RuntimeError("no such algorithm")


def absent():
    raise Absent("not written yet")


def test_a_failing_case_is_recorded_and_the_rest_goes_on(tmp_path):
    with Record(tmp_path).stage("kernels", 60, CPU).running() as stage:
        assert stage.case("bad", fails, layer="x") is None
        assert stage.case("missing", absent) is None
        assert stage.case("good", lambda: {"ms": 1.0}) == {"ms": 1.0}
    bad, missing, good = json.loads((tmp_path / "gpu.json").read_text())["stages"]["kernels"]["cases"]
    assert bad["layer"] == "x"
    assert bad["error"] == "RuntimeError: no such algorithm"
    assert "in fails" in bad["traceback"]
    assert missing["absent"] == "not written yet"
    assert good["ms"] == 1.0


def test_a_stage_out_of_time_names_what_it_passed_over(tmp_path):
    with Record(tmp_path).stage("kernels", 0.0, CPU).running() as stage:
        assert stage.case("late", fails) is None
    entry = json.loads((tmp_path / "gpu.json").read_text())["stages"]["kernels"]
    assert entry["passed over"] == ["late"]
    assert entry["cases"] == []


def test_resuming_passes_over_what_is_known_and_what_hung(tmp_path):
    with Record(tmp_path).stage("kernels", 60, CPU).running() as stage:
        stage.case("first", lambda: {"ms": 1.0})
    (tmp_path / "running.txt").write_text("hung")  # what a killed process leaves
    with Record(tmp_path, resume=True).stage("kernels", 60, CPU).running() as stage:
        assert stage.case("first", fails)["ms"] == 1.0
        assert stage.case("hung", fails) is None
        stage.case("last", lambda: {"ms": 2.0})
    cases = json.loads((tmp_path / "gpu.json").read_text())["stages"]["kernels"]["cases"]
    assert [case["case"] for case in cases] == ["first", "hung", "last"]
    assert "did not finish" in cases[1]["error"]
    assert not (tmp_path / "running.txt").exists()


def test_a_failing_contender_does_not_stop_the_others():
    figures = Bench(CPU, tiny=True).compare({"sgd": lambda: None, "bad": fails, "engm": lambda: None}, "sgd", rounds=3)
    assert figures["sgd"]["ratio"] == 1
    assert "no such algorithm" in figures["bad"]["error"]
    assert "ratio" in figures["engm"]


def test_a_lost_device_ends_the_stage_with_its_cases_saved(tmp_path, monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with (
        pytest.raises(DeviceLostError, match="illegal memory access"),
        Record(tmp_path).stage("kernels", 60, torch.device("cuda")).running() as stage,
    ):
        stage.case("fatal", fails)
    cases = json.loads((tmp_path / "gpu.json").read_text())["stages"]["kernels"]["cases"]
    assert [case["case"] for case in cases] == ["fatal"]


def test_sanitize_says_what_is_missing():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/gpu/sanitize.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "needs a CUDA device" in done.stderr


def test_what_the_sanitizer_runs_is_rehearsed_without_it():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/gpu/sanitize.py"), "--tools", "racecheck", "--dtypes", "float32"],
        env=os.environ | {"ENGM_TEST_DEVICE": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "float32 tf32: " in done.stdout
    assert "== racecheck: no error found" in done.stdout
