"""What a user easily gets wrong and would not notice: radii, repeated options, misspelt folders, other data."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from engm.recipes.cli import app
from engm.recipes.cli.options import config_from
from engm.recipes.config import RunConfig
from engm.recipes.config_files import from_values, to_toml

TINY = "--width 2 --epochs 1 --batch-size 32 --attack-steps 1 --evaluation-steps 2 --train-examples 64 --threads 1"
DIGITS = [*TINY.split(), "--test-examples", "40", "--loggers", "none", "--step", "eager"]


def engm(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


def refused(*arguments: object, status: int = 1) -> str:
    result = engm(*arguments)
    assert result.exit_code == status, (result.output, result.exception)
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    write(tmp_path / "data.npz", seed=0)
    return tmp_path / "data.npz"


def write(path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    images = {f"x_{part}": draw.integers(0, 256, (80, 8, 8, 3), np.uint8) for part in ("train", "test")}
    labels = {f"y_{part}": np.arange(80) % 3 for part in ("train", "test")}
    np.savez(path, **images, **labels)


def on_npz(npz: Path) -> list[object]:
    return ["--data", npz, "--validation-examples", 16, "--model", "vgg8", "--eps", "8/255", *DIGITS]


def test_a_radius_in_grey_levels_is_refused_everywhere(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for threat, eps in (("linf", "8"), ("linf", "1"), ("l2", "128")):
        message = refused("train", *DIGITS, "--threat", threat, "--eps", eps, "--out", out)
        assert f"write {eps}/255" in message
        assert not out.exists()
    assert "write 2/255" in refused("train", *DIGITS, "--step-size", "2", "--out", out)
    assert engm("train", *DIGITS, "--eps", "8/255", "--out", out).exit_code == 0
    assert json.loads((out / "results.json").read_text())["config"]["eps"] == 8 / 255
    assert "write 8/255" in refused("evaluate", out, "--eps", "8")
    with pytest.raises(ValueError, match="write 8/255"):
        from_values({"eps": 8}, source="run.toml")
    assert RunConfig(threat="l2", eps=3.0).resolved().eps == 3.0  # a radius that large images have


def test_an_option_given_twice_is_an_error(tmp_path: Path) -> None:
    out = ["--out", tmp_path / "run"]
    assert "--lr is given 2 times" in refused("train", "--lr", "0.1", *out, "--lr", "0.2", status=2)
    assert "--awp/--no-awp is given 2 times" in refused("train", "--awp", "--no-awp", *out, status=2)
    assert "--out is given 2 times" in refused("report", tmp_path, *out, *out, status=2)
    assert "no run folder" in refused("evaluate", tmp_path, "--attack", "pgd20", "--attack", "natural")


@pytest.mark.parametrize(
    ("typed", "here"),
    [("--learning-rate", "--lr"), ("--batch_size", "--batch-size"), ("--epsilon=0.1", "--eps"), ("--arch", "--model")],
)
def test_an_option_of_other_scripts_is_named_as_it_is_called_here(tmp_path: Path, typed: str, here: str) -> None:
    message = refused("train", typed, "1", "--out", tmp_path / "run", status=2)
    assert f"No such option: {typed.split('=')[0]}; here it is {here}" in message
    assert "here it is" not in refused("report", tmp_path, typed, "1", status=2)  # which has none of these


def test_code_and_tables_that_do_not_say_which(tmp_path: Path) -> None:
    for name in ("model", "data", "objective", "optimizer"):
        message = refused("train", f"--{name}", "net.py", "--out", tmp_path / "run")
        assert "net.py is a Python file: say which function or class in it, as net.py:NAME" in message
    file = tmp_path / "settings.toml"
    file.write_text("[train]\nlr = 0.1\n")
    assert "take the line [train] out" in refused("train", "--config", file, "--out", tmp_path / "run")


def test_an_attack_for_more_classes_is_refused_before_the_first_begins(npz: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert engm("train", *on_npz(npz), "--optimizer", "msgd", "--out", out).exit_code == 0
    message = refused("evaluate", out, "--attack", "natural,autoattack")
    assert "--attack autoattack needs 4 classes, and there are 3: take --attack autoattack-untargeted" in message
    assert not (out / "evaluation.json").exists()
    assert engm("evaluate", out, "--attack", "natural, pgd2", "--checkpoint", "last").exit_code == 0
    assert json.loads((out / "evaluation.json").read_text())["last"].keys() == {"natural", "pgd2"}


def test_the_first_line_says_what_begins_or_goes_on_and_on_which_data(tmp_path: Path) -> None:
    def first_line(*arguments: object) -> str:
        result = engm("train", *arguments)
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output.splitlines()[0]

    out = tmp_path / "trades"
    assert first_line(*DIGITS, "--out", out).startswith(f"Beginning a new run in {out} on digits, the digits that come")
    finished = first_line("--out", out)
    assert finished.startswith(f"The run in {out} was finished before; nothing was done. It was trained on digits")
    assert "for 1 epochs; --epochs with a larger number trains on" in finished
    (out / "results.json").unlink()
    assert first_line("--out", out).startswith(f"Going on with the run in {out} on digits")
    misspelt = first_line(*DIGITS, "--out", tmp_path / "trade")
    assert f"Beginning a new run in {tmp_path / 'trade'} on digits" in misspelt
    assert f"There is a run in {out}: was that one meant?" in misspelt
    assert "there is no run in" in refused("train", "--out", tmp_path / "tradse")


def test_other_images_of_the_same_name_are_not_gone_on_with(npz: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = engm("train", *on_npz(npz), "--out", out)
    assert result.exit_code == 0, (result.output, result.exception)
    (out / "results.json").unlink()
    write(npz, seed=1)
    message = refused("train", "--out", out)
    assert "training and validation and test images of data are not those that this run was trained on" in message
    write(npz, seed=0)
    assert engm("train", "--out", out).exit_code == 0


def test_results_of_other_images_are_not_read_from_the_cache(npz: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert engm("train", *on_npz(npz), "--out", out).exit_code == 0
    evaluate = ("evaluate", out, "--attack", "natural", "--checkpoint", "last")
    for seed, known in ((0, 1), (0, 1), (1, 2), (0, 2)):
        write(npz, seed)
        assert engm(*evaluate).exit_code == 0
        assert len(json.loads((out / "evaluation.json").read_text())["last"]["natural"]) == known


def test_every_panel_of_figure_5_has_its_name() -> None:
    for letter in "abcdefgh":
        page = engm("reproduce", f"fig5{letter}", "--budget", "smoke", "--seeds", "0")
        assert "--seeds" in page.stderr  # the name is known: the fault is another
    assert "unknown figure or table: 'fig5i'" in refused("reproduce", "fig5i", "--budget", "smoke", "--plan")


def warned_of(settings: dict[str, str | int], file: Path | None = None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config_from(settings, file)
    return [str(warning.message) for warning in caught]


def test_decays_behind_the_end_of_a_run_are_a_warning(tmp_path: Path) -> None:
    none = "--decay-epochs 8,9: a run of 8 epochs has no decay after epoch 8 and 9; the learning rate never falls "
    assert warned_of({"epochs": 8, "decay_epochs": "8,9"}) == [f"{none}in this run, unless it is made longer"]
    some = "--decay-epochs 7,9: a run of 8 epochs has no decay after epoch 9; that is too late for it, "
    assert warned_of({"epochs": 8, "decay_epochs": "7,9"}) == [f"{some}unless it is made longer"]
    (tmp_path / "run.toml").write_text("epochs = 8\ndecay-epochs = [20]\n")
    assert len(warned_of({}, tmp_path / "run.toml")) == 1
    assert warned_of({"epochs": 30}, tmp_path / "run.toml") == []
    for silent in ({}, {"decay_epochs": "6,7"}, {"decay_epochs": "none"}, {"schedule_epochs": 100}):
        assert warned_of({"epochs": 8, **silent}) == []
    assert warned_of({"epochs": 1}) == []  # whose decay by default is after its only epoch


def test_and_the_run_is_trained_all_the_same(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="never falls"):
        assert engm("train", *DIGITS, "--decay-epochs", 5, "--out", tmp_path / "run").exit_code == 0


def test_settings_that_nobody_chose_follow_those_that_are_changed(tmp_path: Path) -> None:
    """Where nothing was trained yet, and of another run's file: step size, mode and decays are worked out anew."""
    now = ["--objective", "trades", "--eps", "0.1", "--epochs", 1]
    chosen = RunConfig(eps=0.2, seed=3, width=2, train_examples=64, test_examples=40, batch_size=32, evaluation_steps=2)
    chosen = replace(chosen, epochs=4, attack_steps=1, threads=1, loggers=(), step="eager")
    died, other, fresh = tmp_path / "died", tmp_path / "other", tmp_path / "fresh"
    died.mkdir()
    (died / "config.toml").write_text(to_toml(chosen.resolved()))
    file = tmp_path / "of-another.toml"
    file.write_text(to_toml(chosen.resolved()))
    assert engm("train", *now, "--out", died).exit_code == 0
    assert engm("train", "--config", file, *now, "--out", other).exit_code == 0
    assert engm("train", *DIGITS, "--seed", 3, "--objective", "trades", "--eps", "0.1", "--out", fresh).exit_code == 0
    texts = [(out / "config.toml").read_text() for out in (died, other, fresh)]
    assert len(set(texts)) == 1
    # What somebody wrote into a file of their own was chosen.
    file.write_text(file.read_text().split("\n", 1)[1])
    assert config_from({"eps": "0.1"}, file).resolved().step_size == 0.05


def test_a_folder_in_which_nothing_was_trained_goes_on_without_settings(tmp_path: Path) -> None:
    tiny = RunConfig(width=2, epochs=1, train_examples=64, test_examples=40, attack_steps=1, batch_size=32, seed=7)
    tiny = replace(tiny, loggers=(), step="eager", evaluation_steps=2, threads=1)
    (tmp_path / "config.toml").write_text(to_toml(tiny.resolved()))
    assert engm("train", "--out", tmp_path).exit_code == 0
    assert json.loads((tmp_path / "results.json").read_text())["config"]["seed"] == 7
