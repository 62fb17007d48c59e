"""The zoo's measurements, a network a line: a run goes on where it stopped, and no line is lost."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_models
import zoo_results


def line(name: str, family: str = "timm", **figures: Any) -> dict[str, Any]:
    return {"machine": {"threads": 1}, "family": family, "name": name, **figures}


def names(path: Path) -> list[str]:
    """The names of the networks, in the order of the file."""
    return [json.loads(text)["name"] for text in path.read_text().splitlines()]


def test_lines_are_ordered_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "eval.jsonl"
    assert zoo_results.read(path) == {}
    for found in (line("b"), line("c"), line("a", "torch", error=1.0), line("a", error=2.0)):
        zoo_results.put(path, found)
    assert names(path) == ["a", "b", "c", "a"]
    zoo_results.put(path, line("b", error=3.0))
    assert names(path) == ["a", "b", "c", "a"]
    found = zoo_results.read(path)
    assert found["timm", "b"] == line("b", error=3.0)
    assert found["torch", "a"] == line("a", "torch", error=1.0)


def test_an_interrupted_write_leaves_the_earlier_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "eval.jsonl"
    zoo_results.put(path, line("a"))
    before = path.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            zoo_results.put(path, line("b"))
    assert path.read_bytes() == before
    zoo_results.put(path, line("b"))
    assert names(path) == ["a", "b"]


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "eval.jsonl", zoo_results.write_text_atomic

    def slowly(*arguments: Any) -> None:
        time.sleep(0.02)
        write(*arguments)

    monkeypatch.setattr(zoo_results, "write_text_atomic", slowly)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: zoo_results.put(path, line(name)), "dcba"))
    assert names(path) == list("abcd")


def run(*arguments: object) -> None:
    threads = torch.get_num_threads()
    try:
        zoo.main([str(argument) for argument in (*arguments, "--threads", 1)])
    finally:
        torch.set_num_threads(threads)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    interruptions = [KeyboardInterrupt()]

    def check(case: zoo_models.Case, mode: str) -> dict[str, Any]:
        if measured and interruptions:
            raise interruptions.pop()
        measured.append(case.name)
        return {"family": case.family, "name": case.name, "mode": mode, "refused": f"measurement {len(measured)}"}

    monkeypatch.setattr(zoo, "check", check)
    monkeypatch.setattr(zoo_models, "every", zoo_models.torch_modules)
    with pytest.raises(KeyboardInterrupt):
        run("check", "--out", tmp_path)
    path = tmp_path / "eval.jsonl"
    assert names(path) == measured == ["nn.TransformerEncoder"]
    run("check", "--out", tmp_path)
    assert measured == ["nn.TransformerEncoder", "nn.LSTM"]
    run("check", "--out", tmp_path)
    assert len(measured) == 2
    run("check", "--again", "--only", "LSTM", "--out", tmp_path)
    run("check", "--mode", "train", "--only", "LSTM", "--out", tmp_path)
    assert measured[2:] == ["nn.LSTM", "nn.LSTM"]
    found = zoo_results.read(path)
    assert found["torch", "nn.TransformerEncoder"]["refused"] == "measurement 1"
    assert found["torch", "nn.LSTM"]["refused"] == "measurement 3"
    assert names(tmp_path / "train.jsonl") == ["nn.LSTM"]


def test_which_networks_fall_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(zoo_models, "every", zoo_models.torch_modules)
    run("exact", "--only", "LSTM")
    assert capsys.readouterr().out.startswith("2 of 2 exact, the largest error ")
    run("exact", "--only", "LSTM", "--part", "2/2")
    assert capsys.readouterr().out.startswith("0 of 0 exact")
    monkeypatch.setattr(zoo, "EXACT", -1.0)
    monkeypatch.setattr(zoo, "EXACT_IN_PARTS", -1.0)
    with pytest.raises(SystemExit):
        run("exact", "--only", "LSTM")
    first, _, last = capsys.readouterr().out.splitlines()
    assert first.startswith("nn.LSTM, eval: {'name'")
    assert last.startswith("0 of 2 exact")


def test_a_network_is_measured_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_models, "every", zoo_models.torch_modules)
    run("check", "--only", "LSTM", "--out", tmp_path)
    (found,) = zoo_results.read(tmp_path / "eval.jsonl").values()
    assert found["exact"]
    assert found["ratio"]["ratio"] > 0
    assert found["machine"]["threads"] == 1
    run("time", "--models", "nn.LSTM", "--batch", 2, "--rounds", 1, "--out", tmp_path)
    (beside,) = zoo_results.read(tmp_path / "time.jsonl").values()
    assert set(beside["steps"]) | set(beside["not_run"]) == {"SGD", "ENGM", "Opacus ghost", "torch.func vmap"}
    assert {"SGD", "ENGM"} <= set(beside["steps"])
