"""The table of finished runs, from made-up results: rows, seeds, AutoAttack, and the command that prints it."""

from __future__ import annotations

from pathlib import Path

from made_up_runs import made_up
from typer.testing import CliRunner, Result

from engm.recipes.cli import app
from engm.recipes.runs.report import collect, markdown, rows_of


def report(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": "160"})


def refused(*arguments: object) -> str:
    """What the command says, which must fail with one message."""
    result = report(*arguments)
    assert result.exit_code == 1, result.output
    message = " ".join(result.stderr.split())
    assert message.startswith("engm:")
    assert "Traceback" not in message
    return message


def test_seeds_are_averaged_whatever_cannot_change_a_result(tmp_path: Path) -> None:
    made_up(tmp_path / "runs" / "a", best=0.4, seed=0, log_every=50)
    made_up(tmp_path / "runs" / "b", best=0.6, seed=1, log_every=51, threads=1)
    made_up(tmp_path / "runs" / "c", seed=0, objective="trades", beta=3.0)
    (tmp_path / "runs" / "d").mkdir()
    (tmp_path / "runs" / "d" / "config.toml").write_text("")
    result = report(tmp_path / "runs", tmp_path / "runs" / "a", "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert "Not finished, so not shown" in result.output
    assert "--html FILE a web page" not in result.output
    assert "--html FILE a web page" in report(tmp_path / "runs").output
    rows = (tmp_path / "report" / "report.md").read_text().splitlines()[2:4]
    cells = [[cell.strip() for cell in row.split("|")[1:]] for row in rows]
    assert cells[0][1] == "2"
    assert cells[0][3] == "50.0 ± 14.1"
    assert cells[0][0] == "ENGM, objective pgd, beta 6.0"  # and not its attack_mode, which follows
    assert cells[1][0] == "ENGM, objective trades, beta 3.0"
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.md", "report.png", "report.svg", "report.pdf",
    }  # fmt: skip


def test_runs_of_a_comparison_and_of_other_processes(tmp_path: Path) -> None:
    made_up(tmp_path / "runs" / "table2" / "a", seed=0)
    made_up(tmp_path / "runs" / "b", seed=1, processes=4)
    results, unfinished = collect([tmp_path / "runs"])
    assert (len(results), unfinished) == (2, [])
    assert [row.label for row in rows_of(results)] == ["ENGM, processes 4", "ENGM, processes 1"]


def test_figures_are_never_cut(tmp_path: Path) -> None:
    for index, model in enumerate(("resnet18", "preact-resnet18", "vgg8", "wrn-34-10")):
        options = {"width": index + 1, "objective": "trades", "beta": 1.0 + index, "epochs": 10 + index}
        made_up(tmp_path / "runs" / model, model=model, **options)
    output = report(tmp_path / "runs").output
    assert "…" not in output
    assert output.count("50.0") == 8


def test_the_same_seed_twice_is_refused(tmp_path: Path) -> None:
    runs = [made_up(tmp_path / name, seed=2) for name in ("a", "b")]
    assert "the same settings and the same seed" in refused(*runs)


def test_only_a_whole_autoattack_of_the_best_weights_counts(tmp_path: Path) -> None:
    right = {"examples": 100, "eps": 0.2, "epoch": 3, "accuracy": 0.25}
    wrong = [{**right, key: value, "accuracy": 0.99} for key, value in (("examples", 20), ("eps", 0.1), ("epoch", 2))]
    made_up(tmp_path / "runs" / "a", seed=0, evaluations=[*wrong, right])
    made_up(tmp_path / "runs" / "b", seed=1, evaluations=wrong)
    results, _ = collect([tmp_path / "runs"])
    assert [result["autoattack"] for result in results] == [0.25, None]
    assert "25.0 (of 1)" in markdown(results)


def test_unfinished_runs_alone_are_no_report(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.toml").write_text("")
    assert "none of these runs is finished" in refused(tmp_path)
    assert "has no results yet" in refused(tmp_path / "a")
