"""What ``engm doctor`` looks at."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import engm
from engm.build import KernelTrial
from engm.recipes.cli import app
from engm.recipes.doctor import examine


def test_doctor(tmp_path: Path) -> None:
    command = ["doctor", "--data-root", str(tmp_path), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "cifar10" in result.output
    assert "engm train --download fetches it" in result.output
    assert "trials agree with torch in float64" in result.output
    assert "kernels on cpu, against torch's operators in float64" in result.output


def test_doctor_names_a_wrong_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = engm.SelfTestReport("cpu", (KernelTrial("gram_norm", "float32", "T = 100", 0.3, 1e-5, ""),))
    monkeypatch.setattr(engm, "self_test", lambda device: wrong)
    command = ["doctor", "--data-root", str(tmp_path), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
    assert result.exit_code == 1
    assert "cpu: WRONG: gram_norm in float32: rebuild" in result.output


def threads(tmp_path: Path) -> tuple[str, str]:
    (found,) = [finding for finding in examine(tmp_path, tmp_path) if finding.what == "threads"]
    return found.state, found.detail


def test_doctor_says_what_the_operators_run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = engm.build_info()
    state, detail = threads(tmp_path)
    assert state == "ok"
    assert compiled["cpu_parallel"] in detail
    monkeypatch.setattr(engm, "build_info", lambda: {**compiled, "cpu_parallel": "none (serial)"})
    state, detail = threads(tmp_path)
    assert state == "bad"
    assert "THE CPU OPERATORS RUN ON ONE THREAD" in detail
