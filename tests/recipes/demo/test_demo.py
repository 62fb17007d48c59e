"""The demonstration end to end, tiny: same start for all, reports, command line."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from engm.recipes.accuracy import Accuracy
from engm.recipes.cli import app
from engm.recipes.config import RunConfig
from engm.recipes.data import Dataset, Split
from engm.recipes.demo import Demo, DemoSettings, Training, demo_training, prepare, report, run
from engm.recipes.demo.live import LiveView
from engm.recipes.methods import LABELS, check_methods
from engm.recipes.training.schedule import Schedule


def tiny_dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 1, 8, 8, generator=generator)
    labels = (images[:, 0, :4].mean((1, 2)) > images[:, 0, 4:].mean((1, 2))).long()
    everything = Split(images, labels)
    train, validation, test = (everything.take(rows) for rows in torch.arange(60).split([32, 14, 14]))
    return Dataset("halves", 2, train, validation, test)


class EagerSettings(DemoSettings):
    """Steps are taken as they are, because recording takes longer than these runs."""

    def config(self) -> RunConfig:
        return replace(super().config(), step="eager")


def tiny_settings(kind: type[DemoSettings] = EagerSettings, **changes: object) -> DemoSettings:
    settings = {"training": Training(2, 16), "width": 2, "attack_steps": 2, "eps": 0.05, **changes}
    return kind(**settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished() -> Demo:
    demo = prepare(tiny_settings(evaluate_every=1), tiny_dataset())
    run(demo)
    return demo


def test_all_methods_start_from_the_same_weights() -> None:
    demo = prepare(tiny_settings(), tiny_dataset())
    first, *others = (method.trainer.model.state_dict() for method in demo.runs)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert len({tensor.data_ptr() for state in (first, *others) for tensor in state.values()}) == 3 * len(first)


def test_runs_repeat_themselves(finished: Demo) -> None:
    again = prepare(tiny_settings(evaluate_every=1), tiny_dataset())
    run(again)
    for one, other in zip(finished.runs, again.runs, strict=True):
        assert one.test_best == other.test_best
        assert one.validation == other.validation
        assert [record.loss for record in one.epochs] == [record.loss for record in other.epochs]


def test_a_methods_run_does_not_depend_on_the_others(finished: Demo) -> None:
    """Nor on how its steps run: the demonstration's own settings record them."""
    alone = prepare(tiny_settings(DemoSettings, evaluate_every=1, methods=("engm",)), tiny_dataset())
    run(alone)
    assert alone.runs[0].validation == finished.runs[2].validation
    assert alone.runs[0].epochs[-1].loss == finished.runs[2].epochs[-1].loss
    summary = report.summarise(alone.runs)[0]
    assert summary.time_ratio is None
    assert summary.total_time_ratio is None


def test_summaries(finished: Demo) -> None:
    rows = report.summarise(finished.runs)
    assert [row.label for row in rows] == ["MSGD", "A-ENGM", "ENGM"]
    assert rows[0].time_ratio == rows[0].total_time_ratio == 1.0
    assert rows[0].mean_weight == 1.0
    assert rows[0].fraction_clipped == 0.0
    for row, method in zip(rows, finished.runs, strict=True):
        assert method.test_best is not None
        assert method.test_last is not None
        assert (row.best, row.last) == (method.test_best.robust, method.test_last.robust)
        assert row.overfit == report.overfit(row.best, row.last)
        assert method.best.score == max(accuracy.robust or 0 for accuracy in method.validation.values())


def test_overfit_is_the_papers() -> None:
    assert report.overfit(0.5087, 0.4415) == pytest.approx(0.132, abs=5e-4)  # MSGD in Table 2
    assert report.overfit(0.0, 0.0) == 0.0


def test_mean_over_epochs(finished: Demo) -> None:
    records = finished.runs[2].epochs
    expected = (records[0].mean_weight + records[1].mean_weight) / 2
    assert report.mean_over_epochs(records, "mean_weight") == pytest.approx(expected)


def test_best_is_the_first_of_the_highest_and_last_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = prepare(tiny_settings(evaluate_every=1, training=Training(4, 16), methods=("msgd",)), tiny_dataset())
    (method,) = demo.runs
    looks = iter([Accuracy(0.5, robust, 14) for robust in (0.2, 0.5, 0.5, 0.1, 0.3, 0.4)])
    looked_at = []  # the weights at every look: four at the validation set, then last and best on the test set

    def look(split: str, net: torch.nn.Module | None = None, on_batch: object = None) -> Accuracy:
        looked_at.append({name: tensor.clone() for name, tensor in (net or method.run.net).state_dict().items()})
        return next(looks)

    monkeypatch.setattr(method.run, "evaluate", look)
    run(demo)
    assert (method.best.epoch, method.best.score) == (2, 0.5)
    assert method.test_last == Accuracy(0.5, 0.3, 14)
    assert method.test_best == Accuracy(0.5, 0.4, 14)
    of_second, of_fourth, last, best = (looked_at[k] for k in (1, 3, 4, 5))
    for name in best:
        assert torch.equal(best[name], of_second[name]), name
        assert torch.equal(last[name], of_fourth[name]), name
    assert not torch.equal(best["conv1.weight"], last["conv1.weight"])


def test_the_learning_rate_decays_where_the_paper_says() -> None:
    config = DemoSettings(training=Training(epochs=120)).config().resolved()
    rates = [Schedule(config, 10).lr(epoch) for epoch in range(120)]
    assert rates == pytest.approx([0.1] * 75 + [0.01] * 15 + [0.001] * 30)


def test_bad_schedules() -> None:
    for settings in ({"epochs": 0}, {"epochs": 1, "batch_size": 0}, {"epochs": 1, "lr": 0.0}):
        with pytest.raises(ValueError, match="expected epochs"):
            Training(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="less than one batch"):
        prepare(tiny_settings(training=demo_training(1, 33)), tiny_dataset())


def test_summaries_need_a_finished_run() -> None:
    with pytest.raises(RuntimeError, match="not been tested"):
        report.summarise(prepare(tiny_settings(), tiny_dataset()).runs)


@pytest.fixture(scope="module")
def all_seven() -> Demo:
    demo = prepare(tiny_settings(evaluate_every=1, methods=tuple(LABELS)), tiny_dataset())
    run(demo)
    return demo


def test_all_seven_of_the_paper(all_seven: Demo, tmp_path: Path) -> None:
    labels = ["MSGD", "MGNC", "SNGM", "F-ENGM", "N-ENGM", "A-ENGM", "ENGM"]
    assert [row.label for row in report.summarise(all_seven.runs)] == labels
    text = io.StringIO()
    console = Console(file=text, width=80)
    console.print(report.table(all_seven))
    with LiveView(all_seven, console) as view:
        view.on_epoch(2)
    lines = text.getvalue().splitlines()
    for label in labels:
        assert any(re.match(rf" *{label} .*%.*%", line) for line in lines), f"{label} in one line of the table"
    assert "MGNC and SNGM scale the mean gradient" in report.caption(all_seven)
    report.write_json(all_seven, tmp_path / "results.json", seconds=1.0)
    assert [row["label"] for row in json.loads((tmp_path / "results.json").read_text())["summaries"]] == labels
    report.draw_curves(all_seven, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_thresholds_follow_alpha() -> None:
    """One number, in units of a gradient's norm, so that a network of another size needs no second thought."""
    options = [
        {
            method.name: method.trainer.optimizer
            for method in prepare(tiny_settings(methods=tuple(LABELS), alpha=alpha)).runs
        }
        for alpha in (1.0, 3.0)
    ]
    for name, threshold in (
        ("mgnc", lambda opt: opt.max_norm),
        ("sngm", lambda opt: opt.param_groups[0]["lr"]),
        ("f-engm", lambda opt: opt.alpha),
        ("n-engm", lambda opt: opt.alpha),
        ("engm", lambda opt: opt.alpha),
    ):
        assert threshold(options[1][name]) == pytest.approx(3 * threshold(options[0][name])), name
    assert {opt.param_groups[0]["lr"] for name, opt in options[0].items() if name != "sngm"} == {0.1}


def test_files(finished: Demo, tmp_path: Path) -> None:
    report.write_json(finished, tmp_path / "results.json", seconds=1.5)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["settings"]["training"]["epochs"] == 2
    assert content["settings"]["alpha"] == finished.alpha
    assert content["data"] == {"name": "halves", "train": 32, "validation": 14, "test": 14}
    assert len(content["runs"]["a-engm"]["epochs"]) == 2
    assert content["summaries"][2]["method"] == "engm"
    report.draw_curves(finished, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_table_and_views(finished: Demo) -> None:
    text = io.StringIO()
    console = Console(file=text, width=120)
    console.print(report.table(finished))
    assert re.search(r"A-ENGM .*%.*%", text.getvalue())
    assert "standard error" in report.caption(finished)
    with LiveView(finished, console) as view:
        view.on_step()
        view.on_epoch(2)
    assert "epoch   2/2" in text.getvalue()
    drawn = io.StringIO()
    with LiveView(finished, Console(file=drawn, width=120, force_terminal=True)) as view:
        view.on_epoch(1)
    assert "PGD-20" in drawn.getvalue()


def test_command(tmp_path: Path) -> None:
    arguments = ["demo", "--epochs", "1", "--width", "2", "--batch-size", "320", "--methods", "msgd, ENGM"]
    result = CliRunner().invoke(app, [*arguments, "--alpha", "0.5", "--out", str(tmp_path / "new" / "out")])
    assert result.exit_code == 0, result.output
    assert "640 training, 300 validation and 857 test images" in result.output.replace("\n", " ")
    assert (tmp_path / "new" / "out" / "curves.png").is_file()
    content = json.loads((tmp_path / "new" / "out" / "results.json").read_text())
    assert content["settings"]["methods"] == ["msgd", "engm"]
    assert content["settings"]["alpha"] == 0.5


@pytest.mark.slow
def test_command_with_all_methods_and_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engm.recipes.demo.DemoSettings", EagerSettings)
    arguments = ["demo", "--all", "--epochs", "2", "--width", "2", "--batch-size", "320", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--log", "csv"])
    assert result.exit_code == 0, result.output
    assert all(label in result.output for label in LABELS.values())
    for name in LABELS:
        steps, epochs = (
            (tmp_path / "log" / name / f"{kind}.csv").read_text().splitlines() for kind in ("step", "epoch")
        )
        assert steps[0].startswith("step,loss,weight_mean,clipped,weight_min")
        assert (len(steps), len(epochs)) == (5, 3)
        columns = epochs[0].split(",")
        assert columns[-4:] == ["lr", "seconds", "natural", "robust"]
        assert [line.endswith(",,") for line in epochs[1:]] == [True, False], "looked at every second epoch"
        assert ("norm_mean" in columns) == (name not in ("msgd", "mgnc", "sngm"))


def test_command_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = CliRunner().invoke(app, ["demo", "--log", "tensorboard", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert "tensorboard" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--methods", "adam"],
        ["--methods", ""],
        ["--methods", "msgd,msgd"],
        ["--epochs", "0"],
        ["--alpha", "-1"],
        ["--batch-size", "641"],
        ["--log", "xml"],
    ],
)
def test_command_with_bad_arguments(arguments: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", *arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "out").exists()


def test_methods_are_looked_up_before_anything_is_computed() -> None:
    check_methods(tuple(LABELS))
    with pytest.raises(ValueError, match="out of msgd"):
        DemoSettings(methods=("msgd", "adam"))


def test_importing_engm_imports_none_of_the_recipes_dependencies() -> None:
    code = (
        "import sys, engm, engm.adversarial; "
        "print([m for m in ('sklearn', 'rich', 'typer', 'matplotlib', 'engm.recipes') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
