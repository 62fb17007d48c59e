"""Nobody waits in the dark: help without torch, progress of what takes long, a smoke budget of seconds."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from torch import nn

from engm.adversarial import AutoAttackProgress, autoattack
from engm.recipes.cli.app import COMMANDS, app
from engm.recipes.reproduce import analysis, budget
from engm.recipes.reproduce.analysis import Request
from engm.recipes.reproduce.timing import expense_of
from engm.recipes.runs.progress import RunView


def processor_seconds() -> float:
    """Processor time of all child processes so far, which does not hang on what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_needs_no_torch_and_half_a_second() -> None:
    code = (
        "import sys; from engm.recipes.cli import app\n"
        "try: app(['--help'], prog_name='engm')\n"
        "except SystemExit: sys.stderr.write(str('torch' in sys.modules))"
    )
    seconds = []
    for _ in range(3):
        start = processor_seconds()
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(processor_seconds() - start)
        assert ran.stderr.endswith("False")
        assert all(name in ran.stdout for name in COMMANDS)
    assert min(seconds) < 0.5  # with torch it is over two


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_their_own_help_says(name: str) -> None:
    module, line = COMMANDS[name]
    lazy = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert lazy.real().help.splitlines()[0] == line
    assert hasattr(import_module(f"engm.recipes.cli.{module}"), name)


def test_the_public_names_do_not_hang_on_the_order_of_imports() -> None:
    code = (
        "import sys, engm\n"
        "assert 'torch' not in sys.modules\n"
        "import engm.verify, engm.explain\n"
        "assert callable(engm.verify) and callable(engm.explain)\n"
        "assert all(hasattr(engm, name) for name in engm.__all__)\n"
        "import torch\n"
        "assert torch.ops.engm.linear_norm_sq"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    subprocess.run([sys.executable, "-c", "import engm; engm.adversarial.PGD"], check=True)
    subprocess.run([sys.executable, "-c", "import torch, engm; torch.ops.engm.linear_norm_sq"], check=True)


def test_autoattack_tells_how_far_it_is() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).eval()
    x = torch.rand(6, 1, 4, 4)
    told: list[AutoAttackProgress] = []
    with torch.no_grad():
        y = net(x).argmax(1)
    quiet = autoattack(net, x, y, eps=0.01, version="custom", attacks=["apgd-ce", "square"])
    found = autoattack(net, x, y, eps=0.01, version="custom", attacks=["apgd-ce", "square"], on_progress=told.append)
    assert torch.equal(found.inputs, quiet.inputs)
    assert [p.attack for p in told if p.passes == 1] == ["clean", "apgd-ce", "square"]
    assert {p.attacks for p in told} == {2}
    assert max(p.passes for p in told if p.attack == "square") > 100
    assert not net._forward_hooks

    def stop(progress: AutoAttackProgress) -> None:
        if progress.attack == "square":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        autoattack(net, x, y, eps=0.01, version="custom", attacks=["apgd-ce", "square"], on_progress=stop)
    assert not net._forward_hooks


def test_a_command_says_that_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    module = import_module("engm.recipes.cli.app")

    def on_standard_error(*, stderr: bool) -> Console:
        assert stderr  # standard output may be a pipe
        return Console(file=text, force_terminal=True, width=100)

    monkeypatch.setattr(module, "Console", on_standard_error)
    command = typer.main.get_command(app).commands["doctor"]  # type: ignore[attr-defined]
    assert command.real().name == "doctor"
    assert "loading torch" in text.getvalue()


def test_a_run_says_what_it_waits_for_before_it_begins() -> None:
    text = io.StringIO()
    with RunView(Console(file=text, force_terminal=True, width=100)):
        time.sleep(0.3)
    assert "loading data and making the network" in text.getvalue()


@pytest.mark.slow
def test_a_plan_tells_how_many_kinds_are_timed(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    cells = analysis("table3").cells(Request(budget("smoke"), {}, (0,)))
    expense_of(cells, tmp_path, torch.device("cpu"), 1, lambda done, total: told.append((done, total)))
    kinds = 4  # the methods; optimizers take the time that others take
    assert told == [(done, kinds) for done in range(kinds + 1)]


def test_smoke_makes_no_programs_and_no_plan() -> None:
    for name in ("table2", "table4", "fig5"):
        for cell in analysis(name).cells(Request(budget("smoke"), {}, (0,))):
            assert cell.config.step == "eager"
    assert not budget("smoke").planned
    assert "seconds" in budget("smoke").purpose
