"""Every logger's files, read back."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engm.recipes.training.loggers import CsvLogger, JsonLinesLogger, LogFormat, Logger, TensorBoardLogger

ROWS = [
    ("step", 1, {"loss": 1.5, "norm_max": 3.0}),
    ("step", 2, {"loss": 1.25, "norm_max": 2.0}),
    ("epoch", 1, {"loss": 1.375, "robust": None}),
    ("step", 3, {"loss": 0.5, "norm_max": math.inf}),
    ("epoch", 2, {"loss": math.nan, "robust": 0.75}),
]


def write(logger: Logger, rows: list = ROWS) -> None:
    for kind, index, figures in rows:
        logger.log(kind, index, figures)
    logger.close()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_csv(tmp_path: Path) -> None:
    write(CsvLogger(tmp_path / "new" / "run"))
    steps = (tmp_path / "new" / "run" / "step.csv").read_text().splitlines()
    assert steps == ["step,loss,norm_max", "1,1.5,3.0", "2,1.25,2.0", "3,0.5,inf"]
    with (tmp_path / "new" / "run" / "epoch.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["robust"] for row in rows] == ["", "0.75"]
    assert math.isnan(float(rows[1]["loss"]))


def test_csv_has_the_columns_of_its_first_row(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path)
    logger.log("step", 1, {"loss": 1.0, "lr": 0.1})
    logger.log("step", 2, {"loss": 2.0})
    with pytest.raises(ValueError, match=r"step.csv has no column late, later"):
        logger.log("step", 3, {"loss": 1.0, "late": 1.0, "later": 1.0})
    logger.close()
    assert (tmp_path / "step.csv").read_text().splitlines() == ["step,loss,lr", "1,1.0,0.1", "2,2.0,"]


def test_json_lines(tmp_path: Path) -> None:
    write(JsonLinesLogger(tmp_path))
    rows = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert rows[0] == {"kind": "step", "index": 1, "loss": 1.5, "norm_max": 3.0}
    assert rows[2] == {"kind": "epoch", "index": 1, "loss": 1.375, "robust": None}
    assert rows[3]["norm_max"] == "inf"
    assert math.isnan(float(rows[4]["loss"]))


def test_tensorboard(tmp_path: Path) -> None:
    write(TensorBoardLogger(tmp_path))
    found = scalars(tmp_path)
    assert found["step/loss"] == [(1, 1.5), (2, 1.25), (3, 0.5)]
    assert found["step/norm_max"] == [(1, 3.0), (2, 2.0), (3, math.inf)]
    assert found["epoch/robust"] == [(2, 0.75)]


@pytest.mark.parametrize("name", [LogFormat.CSV, LogFormat.JSON, LogFormat.TENSORBOARD])
def test_a_second_run_in_the_same_folder_replaces_the_first(name: LogFormat, tmp_path: Path) -> None:
    name.check()
    for _ in range(11):  # within a second, so that no name of a file tells which run is the later one
        write(name.open(tmp_path))
    write(name.open(tmp_path), [("step", 1, {"loss": 7.0})])
    if name is LogFormat.CSV:
        assert (tmp_path / "step.csv").read_text().splitlines() == ["step,loss", "1,7.0"]
    elif name is LogFormat.JSON:
        assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    else:
        assert scalars(tmp_path)["step/loss"] == [(1, 7.0)]


def test_tensorboard_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for attempt in (LogFormat.TENSORBOARD.check, lambda: LogFormat.TENSORBOARD.open(tmp_path / "log")):
        with pytest.raises(ModuleNotFoundError, match=r"needs the package tensorboard: pip install 'engm\[recipes\]'"):
            attempt()
    assert not (tmp_path / "log").exists()
    LogFormat.CSV.check()


def test_tensorboard_is_imported_by_nobody_who_does_not_ask() -> None:
    code = "import sys, engm.recipes.cli, engm.recipes.training.trainer; print('tensorboard' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("kind", [LogFormat.CSV, LogFormat.JSON])
def test_a_resumed_log_goes_on_after_the_rows_it_keeps(kind: LogFormat, tmp_path: Path) -> None:
    def write(steps: range, keep: dict[str, int] | None = None) -> None:
        with closing(kind.open(tmp_path, keep)) as logger:
            for step in steps:
                logger.log("step", step, {"loss": step / 8, "norm": None})
                if step % 2 == 0:
                    logger.log("epoch", step // 2, {"robust": step / 4})

    write(range(1, 10))
    if kind is LogFormat.CSV:
        undisturbed = (tmp_path / "step.csv").read_text(), (tmp_path / "epoch.csv").read_text()
        with (tmp_path / "step.csv").open("a") as file:
            file.write("10,1.")  # cut off by a kill
    else:
        undisturbed = ((tmp_path / "log.jsonl").read_text(),)
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write('{"kind": "step", "ind')
    write(range(7, 10), {"step": 6, "epoch": 3})
    files = ("step.csv", "epoch.csv") if kind is LogFormat.CSV else ("log.jsonl",)
    assert tuple((tmp_path / file).read_text() for file in files) == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


class Wandb(ModuleType):
    """What the logger uses of Weights & Biases; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.rows: list[dict[str, float]] = []
        self.axes: dict[str, str] = {}
        self.finished = 0

    def init(self, **settings: Any) -> Wandb:
        self.begun.append(settings)
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("lr = 0.2\n")
    LogFormat.WANDB.check()
    for keep in (None, {"step": 1, "epoch": 0}, None):
        logger = LogFormat.WANDB.open(run / "log", keep)
        logger.log("step", 1, {"loss": 0.5})
        logger.log("epoch", 1, {"robust": 0.25, "natural": None})
        logger.close()
    assert module.rows[:2] == [{"step": 1, "step/loss": 0.5}, {"epoch": 1, "epoch/robust": 0.25}]
    assert module.axes == {"step/*": "step", "epoch/*": "epoch"}
    assert module.finished == 3
    first, again, other = module.begun
    assert first == again, "a run that goes on is the same run there"
    assert other["id"] != first["id"]
    assert {name: first[name] for name in ("project", "name", "dir", "config", "resume")} == {
        "project": "mine",
        "name": "run",
        "dir": str(run / "log"),
        "config": {"lr": 0.2},
        "resume": "allow",
    }
    assert "mode" not in first, "WANDB_MODE is wandb's own to read"


def test_weights_and_biases_is_asked_for_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'engm\[wandb\]'"):
        LogFormat.WANDB.check()
    LogFormat.CSV.check()
