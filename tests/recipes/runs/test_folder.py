"""Runs on disk: killed, resumed, damaged and finished ones, and what they leave behind."""

from __future__ import annotations

import csv
import hashlib
import math
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import PLAIN, KilledAt, tiny_dataset, train_tiny

from engm.checks import NonFiniteError
from engm.recipes.failures import CheckpointError
from engm.recipes.processes import Processes
from engm.recipes.runs.folder import RunFolder
from engm.recipes.runs.view import NoView
from engm.recipes.training.run import Run

CPU = Processes(torch.device("cpu"))
EVERYTHING = replace(
    PLAIN, objective="trades", awp=True, awp_warmup=1, optimizer="a-engm", tau=3, ema=0.9, save_every=3
)


def last_tensors(path: Path) -> str:
    """Digest of every tensor of the last checkpoint: weights, averages, momenta, generators."""
    name, _ = RunFolder(path).store.latest() or ("", None)
    return hashlib.sha256((path / "checkpoints" / name / "tensors.safetensors").read_bytes()).hexdigest()


def rows(path: Path, kind: str) -> list[dict[str, str]]:
    with (path / "log" / f"{kind}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    path = tmp_path_factory.mktemp("whole") / "run"
    train_tiny(EVERYTHING, path)
    return path


def test_results(whole: Path) -> None:
    results = RunFolder(whole).results()
    assert results["method"] == "A-ENGM"
    assert [row["epoch"] for row in results["history"]] == [1, 2, 3]
    best = max(results["history"], key=lambda row: row["robust"])
    assert results["best_epoch"] == best["epoch"]
    assert results["validation"]["robust"] == best["robust"]
    test = results["test"]
    assert test["best"]["examples"] == len(tiny_dataset().test)
    expected = (
        (test["best"]["robust"] - test["last"]["robust"]) / test["best"]["robust"] if test["best"]["robust"] else 0
    )
    assert results["overfit"] == expected
    assert RunFolder(whole).config() == EVERYTHING.resolved()
    assert {row["step"] for row in rows(whole, "step")} == {str(step) for step in range(1, 13)}


def test_the_weights_that_are_kept_are_the_averaged_ones(whole: Path) -> None:
    folder = RunFolder(whole)
    _, state = folder.store.latest() or ("", {})
    kept = folder.weights("last")
    last = kept.weights
    assert (kept.epoch, kept.checkpoint) == (3, "step-00000012")
    assert last.keys() == state["net"].keys()
    assert not torch.equal(last["linear.weight"], state["net"]["linear.weight"])
    assert torch.equal(last["linear.weight"], state["average"]["module.linear.weight"])


@pytest.mark.parametrize(
    ("steps", "step"), [(1, "eager"), (3, "auto"), (4, "eager"), (5, "eager"), (9, "auto"), (11, "eager")]
)
def test_a_stopped_run_goes_on_to_the_same_bits(whole: Path, tmp_path: Path, steps: int, step: str) -> None:
    """Whether its steps are recorded or not."""
    path, config = tmp_path / "run", replace(EVERYTHING, step=step)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(config, path, view=KilledAt(steps))
    for further in (2, 4):  # not before, if it is over sooner
        with suppress(KeyboardInterrupt):
            train_tiny(config, path, view=KilledAt(further))
    results = train_tiny(config, path)
    assert last_tensors(path) == last_tensors(whole)
    undisturbed = RunFolder(whole).results()
    assert results["test"] == undisturbed["test"]
    for mine, other in zip(results["history"], undisturbed["history"], strict=True):
        timeless = {k: v for k, v in mine.items() if "seconds" not in k}
        assert timeless == {k: v for k, v in other.items() if "seconds" not in k}
    for kind in ("step", "epoch"):
        found, wanted = rows(path, kind), rows(whole, kind)
        assert [{**row, "seconds": ""} for row in found] == [{**row, "seconds": ""} for row in wanted]


def test_a_finished_run_is_left_alone(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert train_tiny(EVERYTHING, whole) == RunFolder(whole).results()
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_other_settings_are_refused_by_name(whole: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a run with other settings: --lr 0.1 \(now 0.2\), --seed 0 \(now 1\)"):
        train_tiny(replace(EVERYTHING, lr=0.2, seed=1, loggers=()), whole)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear Sir")
    with pytest.raises(ValueError, match="exists and is no run folder"):
        train_tiny(PLAIN, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_finished_run_without_checkpoints_is_not_begun_anew(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints")  # to have room on the disk
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert train_tiny(EVERYTHING, copy) == RunFolder(whole).results()
    with pytest.raises(ValueError, match=r"copy has results of \d+ epochs and no checkpoints any more"):
        train_tiny(replace(EVERYTHING, epochs=EVERYTHING.epochs + 1), copy)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_settings_may_be_mended_while_nothing_is_trained(tmp_path: Path) -> None:
    class Fails(NoView):
        def begin(self, run: Run) -> None:
            raise MemoryError

    with pytest.raises(MemoryError):
        train_tiny(replace(PLAIN, batch_size=64), tmp_path / "run", view=Fails())
    assert RunFolder(tmp_path / "run").config().batch_size == 64
    assert train_tiny(PLAIN, tmp_path / "run")["config"]["batch_size"] == 16
    assert RunFolder(tmp_path / "run").config() == PLAIN.resolved()


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    class Breaks(NoView):
        def begin(self, run: Run) -> None:
            self.run = run

        def on_step(self) -> None:
            if self.run.trainer.steps == 3:
                with torch.no_grad():
                    self.run.net.get_parameter("linear.bias").fill_(math.inf)

    with pytest.raises(NonFiniteError):
        train_tiny(replace(PLAIN, epochs=1, save_every=1), tmp_path / "run", view=Breaks())
    kept = RunFolder(tmp_path / "run").weights("last").weights
    assert all(bool(t.isfinite().all()) for t in kept.values())


def test_nothing_is_written_before_everything_was_checked(tmp_path: Path) -> None:
    for wrong in ({"batch_size": 1000}, {"model": "resnet81"}):
        with pytest.raises(ValueError, match=r"1000|resnet"):
            train_tiny(replace(PLAIN, **wrong), tmp_path / "run")  # type: ignore[arg-type]
        assert not (tmp_path / "run").exists()


class TestDamage:
    """A run that was stopped in its third epoch, and whose last checkpoint then suffered."""

    @pytest.fixture
    def stopped(self, tmp_path: Path) -> Path:
        with pytest.raises(KeyboardInterrupt):
            train_tiny(EVERYTHING, tmp_path / "run", view=KilledAt(10))
        return tmp_path / "run"

    @pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "SHA256SUMS"])
    def test_the_previous_checkpoint_is_used(self, stopped: Path, whole: Path, file: str) -> None:
        name, _ = RunFolder(stopped).store.latest() or ("", None)
        damaged = stopped / "checkpoints" / name / file
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
        with pytest.warns(UserWarning, match=f"{name}/{file}.*is used instead"):
            train_tiny(EVERYTHING, stopped)
        assert last_tensors(stopped) == last_tensors(whole)

    def test_a_run_with_no_good_checkpoint_says_so(self, stopped: Path) -> None:
        for path in (stopped / "checkpoints").glob("step-*/state.json"):
            path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(RuntimeError, match="can be used"):
            train_tiny(EVERYTHING, stopped)

    def test_a_best_checkpoint_of_a_future_that_did_not_happen_is_dropped(self, stopped: Path) -> None:
        store = RunFolder(stopped).store
        store.save("best-00000099", {"epoch": 99, "net": {}, "accuracy": {}})
        train_tiny(EVERYTHING, stopped)
        assert RunFolder(stopped).weights("best").epoch <= 3
        assert not (stopped / "checkpoints" / "best-00000099").exists()

    def test_a_damaged_best_checkpoint_does_not_keep_a_run_from_its_end(self, whole: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(whole, copy)
        before = RunFolder(copy).results()
        (copy / "results.json").unlink()
        name = RunFolder(copy).weights("best").checkpoint
        (copy / "checkpoints" / name / "tensors.safetensors").write_bytes(b"")
        if before["best_epoch"] == before["epochs"]:  # then the weights are at hand
            after = train_tiny(EVERYTHING, copy)
        else:
            with pytest.warns(UserWarning, match="results are of the last weights only"):
                after = train_tiny(EVERYTHING, copy)
            assert after["overfit"] is None
            assert after["test"].keys() == {"last", "last_plain"}
        assert after["test"]["last"] == before["test"]["last"]

    def test_a_damaged_best_checkpoint_is_not_replaced_by_an_older_one(self, whole: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(whole, copy)
        best = RunFolder(copy).weights("best")
        tensors = copy / "checkpoints" / best.checkpoint / "tensors.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=f"{best.checkpoint}/tensors.safetensors: checksum differs"):
            RunFolder(copy).weights("best")


def test_a_diverged_run_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    diverging = replace(PLAIN, optimizer="msgd", lr=1e30, weight_decay=0.0, save_every=1)
    with pytest.raises((ValueError, RuntimeError), match="finite"):
        train_tiny(diverging, tmp_path / "run")
    for _, state in [RunFolder(tmp_path / "run").store.latest() or ("", {"net": {}})]:
        assert all(bool(t.isfinite().all()) for t in state["net"].values() if t.is_floating_point())
    assert not (tmp_path / "run" / "results.json").exists()


def test_early_stopping(tmp_path: Path) -> None:
    results = train_tiny(replace(PLAIN, epochs=50, early_stop=2, lr=1e-9), tmp_path / "run")
    assert results["stopped_early"]
    assert results["epochs"] == results["best_epoch"] + 2
    rare = replace(PLAIN, epochs=50, early_stop=1, evaluate_every=3, lr=1e-9)  # counts looks, not epochs without one
    results = train_tiny(rare, tmp_path / "rare")
    assert results["epochs"] == results["best_epoch"] + 3


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    class Intruder(NoView):
        def on_step(self) -> None:
            script = (
                "import sys, torch; from pathlib import Path; from tiny_runs import PLAIN, tiny_dataset\n"
                "from engm.recipes.processes import Processes; from engm.recipes.runs.folder import train\n"
                "train(PLAIN, Path(sys.argv[1]), Processes(torch.device('cpu')), dataset=tiny_dataset())"
            )
            command = [sys.executable, "-c", script, str(tmp_path / "run")]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            assert done.returncode == 1
            assert "another process" in done.stderr
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tiny(PLAIN, tmp_path / "run", view=Intruder())


KILLER = """
import os, random, signal, sys, time, warnings
from dataclasses import replace
from pathlib import Path
import torch
from tiny_runs import PLAIN, tiny_dataset
from engm.recipes.processes import Processes
from engm.recipes.runs.folder import RunFolder, train

path, kills, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(7)
config = replace(PLAIN, epochs=16, save_every=2, loggers=("csv",))
warnings.simplefilter("ignore")

def child():
    pid = os.fork()
    if pid == 0:
        train(config, path, Processes(torch.device("cpu")), dataset=tiny_dataset())
        os._exit(0)
    return pid

begun = time.monotonic()
os.waitpid(child(), 0)
length = time.monotonic() - begun
undisturbed = path.rename(path.with_name("undisturbed"))
killed, lost = 0, 0
while killed < kills:
    pid = child()
    time.sleep(draw.uniform(0.02, 2.4 * length / kills))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        path.rename(path.with_name(f"finished-{killed}"))  # too quick for us: begin again
    killed += os.WIFSIGNALED(status)
pid = child()
_, status = os.waitpid(pid, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.slow
def test_a_dozen_kills_end_in_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL at random moments: building, stepping, writing a checkpoint, evaluating."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLER, str(tmp_path / "run"), "12"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert last_tensors(tmp_path / "run") == last_tensors(tmp_path / "undisturbed")
    assert rows(tmp_path / "run", "epoch")[-1]["epoch"] == "16"
    assert [row["step"] for row in rows(tmp_path / "run", "step")] == [str(k) for k in range(1, 65)]
    left = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".tmp")]
    assert not left
