"""The page about code of one's own: its blocks are one file, and its commands train, go on, evaluate and export."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from engm.recipes.cli import app

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "your_own.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^    (engm .*)$", PAGE, re.MULTILINE)]
LITTLE = "--epochs 1 --train-examples 64 --test-examples 40 --width 3 --attack-steps 2 --evaluation-steps 2 --threads 1"
LITTLE = f"{LITTLE} --step eager --loggers none --validation-examples 20 --batch-size 32"


def engm(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "400"})


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("\n\n".join(BLOCKS))
    monkeypatch.chdir(tmp_path)


def test_every_block_is_twenty_lines_at_most() -> None:
    assert len(BLOCKS) == 5
    assert all(len(block.strip().splitlines()) <= 20 for block in BLOCKS)


@pytest.mark.usefixtures("_here")
def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [command[0] for command in COMMANDS] == ["train", "train", "evaluate", "export", "compare"]
    for command in COMMANDS:
        more = LITTLE.split() if "--data" in command else ["--examples", "20"] if command[0] == "evaluate" else []
        kept = [word for word in command if not (command[0] == "evaluate" and word in ("--examples", "100"))]
        if command[1] == "--out":  # from any directory
            (tmp_path / "elsewhere").mkdir()
            monkeypatch.chdir(tmp_path / "elsewhere")
            kept[kept.index("--out") + 1] = str(tmp_path / "runs" / "mine")
        result = engm(*kept, *more)
        monkeypatch.chdir(tmp_path)
        assert result.exit_code == 0, (command, result.output, result.exception)
    assert "mine.Soft" in (tmp_path / "runs" / "mine" / "results.json").read_text()
    assert (tmp_path / "net.safetensors").is_file()
    assert "mine.adam" in (tmp_path / "runs" / "compared" / "comparison.md").read_text()


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--data mine.py:digit",
            "mine.py: 'digit'; did you mean digits? (known: digits, Net, pairing, PAIRING, Soft, adam)",
        ),
        ("--model mine.py:Nett", "did you mean Net"),
        ("--model mein:Net", "unknown module of the network 'mein'"),
        ("--model mine.py:digits", "mine.py:digits is called with num_classes="),
        ("--objective mine.py:Net", "must be an engm.adversarial.Objective or a function"),
        ("--objective mine.py:pairings", "did you mean pairing"),
        ("--optimizer mine.py:digits", "called with the wrapped network and its SGD, failed: TypeError"),
        ("--optimizer none.py:Soft", "in that folder: mine.py"),
        ("--model mine.py:Net --data mine.py:digits --optimizer mine.py:Soft --alpha 3", "--alpha is for ENGM"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path: Path, options: str, message: str) -> None:
    data = [] if "--data" in options else ["--data", "mine.py:digits"]
    little = LITTLE.replace("--width 3 ", "") if "--model mine.py:digits" in options else LITTLE
    result = engm("train", *data, *options.split(), *little.split(), "--out", "run")
    assert result.exit_code == 1, result.output
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()
