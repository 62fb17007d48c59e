"""Exported networks give the outputs of the run's, or there is no file."""

from __future__ import annotations

import errno
import pkgutil
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_runs import PLAIN, tiny_dataset

from engm.recipes.models import small_resnet
from engm.recipes.processes import Processes
from engm.recipes.runs.export import ExportFormat, export
from engm.recipes.runs.folder import RunFolder, train
from engm.recipes.storage.atomic_files import read_json, write_json


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    path = tmp_path_factory.mktemp("exported") / "run"
    train(replace(PLAIN, epochs=1), path, Processes(torch.device("cpu")), dataset=tiny_dataset())
    return RunFolder(path)


def network(run: RunFolder) -> torch.nn.Module:
    net = small_resnet(3, classes=2)
    net.load_state_dict(run.weights("last").weights)
    return net.eval()


def read_onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path.read_bytes())
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def read_weights(path: Path) -> torch.nn.Module:
    from safetensors.torch import load_file

    net = small_resnet(3, classes=2)
    net.load_state_dict(torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path))
    return net.eval()


READERS: dict[str, Callable[[Path], Any]] = {
    "pt": read_weights,
    "safetensors": read_weights,
    "pt2": lambda path: torch.export.load(path).module(),
    "onnx": read_onnx,
}


@pytest.mark.parametrize("kind", READERS)
def test_it_gives_the_outputs_of_the_run_without_its_data(run: RunFolder, tmp_path: Path, kind: str) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    file = tmp_path / f"net.{kind}"
    with mock.patch("engm.recipes.runs.export.load_dataset", side_effect=AssertionError("reads the data")):
        assert export(run, file, ExportFormat(kind), "last") == 1
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    again = READERS[kind](file)
    for count in (1, 5):
        x = torch.rand(count, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(again(x), network(run)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", READERS)
def test_a_full_disk_is_said_and_leaves_no_file(run: RunFolder, tmp_path: Path, kind: str) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(Path, "write_bytes", side_effect=full), pytest.raises(OSError, match="free some space"):
        export(run, tmp_path / f"net.{kind}", ExportFormat(kind), "last")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["pt", "safetensors", "pt2"])
def test_other_outputs_leave_no_file(run: RunFolder, tmp_path: Path, kind: str) -> None:
    places = {"pt": "torch.load", "safetensors": "safetensors.torch.load_file", "pt2": "torch.export.load"}
    real = pkgutil.resolve_name(places[kind])

    def altered(*given: Any, **more: Any) -> Any:
        found = real(*given, **more)
        weights = found.state_dict if kind == "pt2" else found
        weights["linear.bias"].data.add_(0.1)
        return found

    with mock.patch(places[kind], side_effect=altered), pytest.raises(ValueError, match=r"other outputs.*by up to 0.1"):
        export(run, tmp_path / f"net.{kind}", ExportFormat(kind), "last")
    assert not list(tmp_path.iterdir())


def test_a_run_that_does_not_say_its_shape_reads_its_data(run: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    results = read_json(copy.results_file)
    assert results["data"].pop("shape") == [1, 8, 8]
    write_json(copy.results_file, results)
    with mock.patch("engm.recipes.runs.export.load_dataset", return_value=tiny_dataset()) as load:
        export(copy, tmp_path / "net.pt", ExportFormat.PT)
    assert load.called


def test_without_the_packages_of_onnx(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"files of ONNX need onnx.*: pip install 'engm\[onnx\]'"):
        export(run, tmp_path / "net.onnx", ExportFormat.ONNX)
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_traced(run: RunFolder, tmp_path: Path) -> None:
    for kind, place in (("pt2", "torch.export.export"), ("onnx", "torch.onnx.export")):
        fails = mock.patch(place, side_effect=RuntimeError("data-dependent\nand more"))
        with fails, pytest.raises(ValueError, match=r"make a program of this network: RuntimeError: data-dependent$"):
            export(run, tmp_path / f"net.{kind}", ExportFormat(kind))
        assert not list(tmp_path.iterdir())
