"""Runs that start from given weights: every kind of file, what does not fit, and whose weights they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from tiny_runs import CPU, PLAIN, KilledAt, tiny_dataset, train_tiny

from engm.recipes.runs.files import evaluated_weights
from engm.recipes.runs.folder import RunFolder, train
from engm.recipes.runs.given_weights import read_weights
from engm.recipes.runs.progress import RunView
from engm.recipes.training.initial import Initial
from engm.recipes.training.run import Run

SHORT = replace(PLAIN, optimizer="msgd", epochs=1, attack_steps=1)
# Takes steps that change nothing: the last weights are the first.
STILL = replace(SHORT, norm="group", lr=1e-30, momentum=0.0, weight_decay=0.0)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with averaged weights, and these as files."""
    path = tmp_path_factory.mktemp("source")
    train_tiny(replace(SHORT, norm="group", ema=0.5, seed=5), path / "run")
    weights = RunFolder(path / "run").weights("last").weights
    torch.save(weights, path / "net.pt")
    save_file(weights, path / "net.safetensors")
    return path


@pytest.mark.parametrize("kind", ["run", "run/checkpoints/step-00000004", "net.pt", "net.safetensors"])
def test_every_kind_of_file(kind: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    results = train_tiny(replace(STILL, init=str(source / kind)), path)
    last = RunFolder(path).weights("last").weights
    expected = RunFolder(source / "run").weights("best" if kind == "run" else "last").weights
    assert equal(last, expected)
    assert results["initial"] == Initial("", expected).identity
    assert RunFolder(path).config().init == str(source / kind)


def test_a_checkpoint_of_the_best_weights(source: Path) -> None:
    folder = RunFolder(source / "run")
    name = folder.weights("best").checkpoint
    assert equal(read_weights(folder.path / "checkpoints" / name), folder.weights("best").weights)
    _, state = folder.store.latest() or ("", {})
    assert not equal(evaluated_weights(state), state["net"])


def test_weights_of_another_network(source: Path, tmp_path: Path) -> None:
    weights = read_weights(source / "net.pt")
    weights["linear.weight"] = torch.zeros(5, weights["linear.weight"].shape[1])
    del weights["linear.bias"]
    weights["head.scale"] = torch.ones(2)
    file = tmp_path / "other.pt"
    torch.save(weights, file)
    with pytest.raises(ValueError, match="these are the weights of another network") as error:
        train_tiny(replace(STILL, init=str(file)), tmp_path / "run")
    for part in (
        "linear.weight [5, 12] (the network's is [2, 12])",
        "head.scale [2]",
        "not given: linear.weight, linear.bias; --no-init-strict loads what fits",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "run").exists()
    console = Console(record=True, width=400)
    with RunView(console) as view:
        train(
            replace(STILL, init=str(file), init_strict=False), tmp_path / "run", CPU, view=view, dataset=tiny_dataset()
        )
    assert "not in the network: linear.weight [5, 12]" in console.export_text()
    last = RunFolder(tmp_path / "run").weights("last").weights
    drawn = Run(STILL, CPU, tiny_dataset()).net.state_dict()
    for name, tensor in last.items():
        assert torch.equal(tensor, drawn[name] if name.startswith("linear.") else weights[name]), name
    torch.save({"else": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="weights of another network"):
        train_tiny(replace(STILL, init=str(file), init_strict=False), tmp_path / "none")


def test_the_weights_belong_to_the_run(source: Path, tmp_path: Path) -> None:
    file, path = tmp_path / "net.pt", tmp_path / "run"
    weights = read_weights(source / "net.pt")
    torch.save(weights, file)
    config = replace(SHORT, norm="group", init=str(file))

    for _ in range(2):  # the second step is the first that is saved
        with pytest.raises(KeyboardInterrupt):
            train_tiny(replace(config, save_every=1), path, view=KilledAt(1))
    weights["linear.bias"][0] += 1
    torch.save(weights, file)
    with pytest.raises(ValueError, match="are not those that this run started from"):
        train_tiny(config, path)
    file.unlink()
    results = train_tiny(config, path)  # it has weights of its own by now
    assert results["initial"] == Initial("", read_weights(source / "net.pt")).identity
    with pytest.raises(FileNotFoundError, match=r"net.pt: the path does not exist; expected a run folder"):
        train_tiny(config, tmp_path / "another")


def test_other_files_are_refused(tmp_path: Path) -> None:
    def refused(name: str) -> str:
        with pytest.raises(ValueError, match="--init") as error:
            read_weights(tmp_path / name)
        return str(error.value)

    torch.save({"state_dict": {"w": torch.ones(1)}, "epoch": 3}, tmp_path / "nested.pt")
    assert "a dict with the entries state_dict, epoch; save one of state_dict by itself" in refused("nested.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    assert "can run any code when they are loaded" in refused("module.pt")
    (tmp_path / "net.safetensors").write_bytes(b"nothing")
    assert "cannot be read as weights" in refused("net.safetensors")
    (tmp_path / "text.pt").write_text("nothing")
    refused("text.pt")
    (tmp_path / "empty").mkdir()
    assert "is empty; expected a run folder" in refused("empty")
