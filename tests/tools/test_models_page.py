"""The committed page of models is what the committed measurements say; its generator notices any other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import write_models_page


def generate(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["write_models_page.py", *options])
    write_models_page.main()


def test_the_page_is_the_generated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generate(monkeypatch, "--check")


def test_another_page_is_noticed_and_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    page.write_text(write_models_page.PAGE.read_text().replace("| yes |", "| **no** |", 1))
    monkeypatch.setattr(write_models_page, "PAGE", page)
    monkeypatch.setattr(write_models_page, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"models.md is not what the measurements say"):
        generate(monkeypatch, "--check")
    generate(monkeypatch)
    generate(monkeypatch, "--check")


def test_nothing_measured_is_no_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(write_models_page, "ZOO", tmp_path)
    with pytest.raises(SystemExit, match="nothing was measured yet"):
        generate(monkeypatch, "--check")


def test_no_path_of_a_machine_is_published() -> None:
    for path in sorted(write_models_page.ZOO.glob("*.jsonl")):
        assert "/tmp/" not in path.read_text(), path
