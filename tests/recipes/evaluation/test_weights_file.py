"""Weights of others: whatever their names begin with, and whatever lies beside them, they are those of the network."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_runs import EPS, Trained, ran, refused
from safetensors.torch import save_file

from engm.recipes.config import RunConfig
from engm.recipes.data import Dataset, Split
from engm.recipes.evaluation.subjects import WeightsFile
from engm.recipes.evaluation.weights_file import fitted, read_weights
from engm.recipes.models import build_model
from engm.recipes.storage.weights_files import digest_of

Weights = dict[str, torch.Tensor]


def renamed(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


FORMS: dict[str, Callable[[Weights], Any]] = {
    "plain": lambda w: w,
    "parallel": lambda w: renamed(w, "module."),
    "nested": lambda w: {"state_dict": renamed(w, "model."), "epoch": 3, "best": torch.tensor(0.5)},
    "twice": lambda w: {"epoch": 1, "model": {"net": renamed(w, "module.model.")}},
    "old": lambda w: {k: t for k, t in w.items() if not k.endswith("num_batches_tracked")},
    "copied": lambda w: {**renamed(w, "module.model."), **renamed(w, "module.attacker.model.")},
}


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_same_network(trained: Trained, tmp_path: Path, form: str) -> None:
    torch.save(FORMS[form](trained.weights), tmp_path / "net.pt")
    found = fitted(read_weights(tmp_path / "net.pt"), trained.network().state_dict(), "it")
    assert (found.mean, found.std) == (None, None)
    assert found.weights.keys() == trained.weights.keys()
    assert all(torch.equal(found.weights[k], t) for k, t in trained.weights.items() if "tracked" not in k)


def test_a_file_has_the_accuracy_of_the_run_that_it_came_from(trained: Trained, tmp_path: Path) -> None:
    torch.save({"net": renamed(trained.weights, "module.")}, tmp_path / "net.pt")
    save_file(trained.weights, tmp_path / "net.safetensors")
    for name in ("net.pt", "net.safetensors"):
        ran("evaluate", tmp_path / name, *trained.options, "--attack", "natural", "--attack", "pgd3")
        found = json.loads((tmp_path / f"{name}.evaluation.json").read_text())["weights"]
        assert found["natural"][0]["accuracy"] == trained.natural
        assert found["pgd3"][0]["accuracy"] == trained.robust
        assert (found["pgd3"][0]["eps"], found["pgd3"][0]["threat"]) == (EPS, "linf")


STD = (0.2, 0.25, 0.5)


@pytest.mark.parametrize("names", [("mu", "sigma"), ("0.mean", "0.std"), ("normalizer.new_mean", "normalizer.new_std")])
def test_a_normalisation_in_the_file_is_put_in_front(trained: Trained, tmp_path: Path, names: tuple[str, str]) -> None:
    prefix = {"mu": "", "0.mean": "1.", "normalizer.new_mean": "model."}[names[0]]
    std = torch.tensor(STD).view(1, 3, 1, 1)
    weights = {**trained.weights, "conv1.weight": trained.weights["conv1.weight"] * std}
    both = {names[0]: torch.zeros(1, 3, 1, 1), names[1]: std}
    torch.save({"state_dict": renamed({**renamed(weights, prefix), **both}, "module.")}, tmp_path / "net.pt")
    output = ran("evaluate", tmp_path / "net.pt", *trained.options, "--attack", "natural", "--attack", "pgd3")
    found = json.loads((tmp_path / "net.pt.evaluation.json").read_text())["weights"]
    assert found["natural"][0]["accuracy"] == pytest.approx(trained.natural, abs=0.026), output
    assert found["pgd3"][0]["accuracy"] == pytest.approx(trained.robust, abs=0.051)
    assert found["pgd3"][0]["std"] == pytest.approx(STD)


def test_a_normalisation_by_the_command_line(trained: Trained, tmp_path: Path) -> None:
    std = torch.tensor(STD).view(1, 3, 1, 1)
    weights = {**trained.weights, "conv1.weight": trained.weights["conv1.weight"] * std}
    torch.save(weights, tmp_path / "net.pt")
    evaluate = ("evaluate", tmp_path / "net.pt", *trained.options, "--attack", "natural")
    ran(*evaluate, "--mean", "0", "--std", "0.2,1/4,0.5")
    ran(*evaluate)
    entries = json.loads((tmp_path / "net.pt.evaluation.json").read_text())["weights"]["natural"]
    assert [entry["std"] for entry in entries] == [[0.2, 0.25, 0.5], None]
    assert entries[0]["accuracy"] == pytest.approx(trained.natural, abs=0.026)
    assert "--mean and --std belong together" in refused(*evaluate, "--mean", "0.5")
    assert "one for each of the 3 channels, got 2 and 1" in refused(*evaluate, "--mean", "0,0", "--std", "1")
    assert "divide what is of grey levels by 255" in refused(*evaluate, "--mean", "125.3", "--std", "63")
    assert "expected a number" in refused(*evaluate, "--mean", "a", "--std", "1")
    torch.save({**weights, "mean": torch.zeros(3), "std": std}, tmp_path / "net.pt")
    assert "leave --mean and --std out" in refused(*evaluate, "--mean", "0", "--std", "0.5")
    ran(*evaluate, "--mean", "0", "--std", "0.2,0.25,0.5")


def test_what_is_refused(trained: Trained, tmp_path: Path) -> None:
    expected, file = trained.network().state_dict(), tmp_path / "net.pt"

    def message(value: Any) -> str:
        torch.save(value, file)
        with pytest.raises(ValueError, match=r".+") as caught:
            fitted(read_weights(file), expected, "net.pt, for small-resnet")
        return str(caught.value)

    assert "is it another network" in message({k: t for k, t in trained.weights.items() if "layer2" not in k})
    assert "has 1 tensors that the network has not (layer9.weight)" in message(
        {**trained.weights, "layer9.weight": torch.ones(3)}
    )
    assert "linear.bias is [4], expected [3]" in message({**trained.weights, "linear.bias": torch.ones(4)})
    other = {name: tensor + 1 for name, tensor in trained.weights.items()}
    assert "several networks, under 'a.', 'b.'" in message({**renamed(trained.weights, "a."), **renamed(other, "b.")})
    assert "several input normalisations" in message(
        {
            **trained.weights,
            "a.mean": torch.zeros(3),
            "a.std": torch.ones(3),
            "mu": torch.ones(3),
            "sigma": torch.ones(3),
        }
    )
    assert "no weights in it: expected a state_dict" in message({"epoch": 3})
    assert "got a list" in message([1, 2])
    assert "holds a argparse.Namespace beside tensors" in message(
        {"args": argparse.Namespace(a=1), "state_dict": trained.weights}
    )
    for name in ("net.pt", "net.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match=r"not a file that torch.save|no safetensors file"):
            read_weights(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_weights(tmp_path / "other.pt")


def test_the_idle_block_of_public_wide_networks_is_passed_over(tmp_path: Path) -> None:
    net = build_model("wrn-10-1", classes=3, width=2)
    weights = net.state_dict()
    idle = {f"sub_{name}": tensor + 1 for name, tensor in weights.items() if name.startswith("block1.")}
    assert idle
    torch.save({"state_dict": renamed({**weights, **idle}, "module.")}, tmp_path / "wide.pt")
    config = RunConfig(data="digits", model="wrn-10-1", width=2).resolved()
    images = Split(torch.empty(0, 3, 32, 32), torch.empty(0, dtype=torch.int64))
    found, _, _ = WeightsFile(tmp_path / "wide.pt", config).network(Dataset("none", 3, images, images, images))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(found(x), net.eval()(x))


OWN = """
from torch import nn
def Net(num_classes, in_channels):
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(in_channels, num_classes))
"""


def test_other_code_of_ones_own_is_another_network(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(OWN)
    torch.save({"2.weight": torch.randn(3, 3), "2.bias": torch.zeros(3)}, tmp_path / "net.pt")
    arguments = ("evaluate", tmp_path / "net.pt", "--model", f"{tmp_path}/nets.py:Net", "--data", trained.data)
    for _ in range(2):
        ran(*arguments, "--attack", "natural")
    (tmp_path / "nets.py").write_text(f"{OWN}# another version\n")
    ran(*arguments, "--attack", "natural")
    found = json.loads((tmp_path / "net.pt.evaluation.json").read_text())["weights"]["natural"]
    assert len({entry["code"] for entry in found}) == len(found) == 2


def test_a_digest_is_of_names_shapes_and_bits() -> None:
    first = {"a": torch.arange(4.0), "b": torch.tensor(3)}
    assert digest_of(first) == digest_of(dict(reversed(list(first.items()))))
    others = [
        {**first, "a": torch.arange(4.0).view(2, 2)},
        {**first, "b": torch.tensor(4)},
        {"c": first["a"], "b": first["b"]},
    ]
    assert len({digest_of(other) for other in (first, *others)}) == 4


def test_options_that_do_not_belong(trained: Trained, tmp_path: Path) -> None:
    torch.save(trained.weights, tmp_path / "net.pt")
    assert "say with --data what it is of" in refused("evaluate", tmp_path / "net.pt", "--model", "small-resnet")
    assert "--model is for files of weights" in refused("evaluate", trained.path, "--model", "resnet18")
    assert "--mean, --std is for files" in refused("evaluate", trained.path, "--mean", "0", "--std", "1")
    message = refused("evaluate", tmp_path / "net.pt", *trained.options, "--checkpoint", "last")
    assert "--checkpoint is for runs" in message
    assert "does not exist" in refused("evaluate", tmp_path / "none.pt", *trained.options)
    assert "did you mean linf" in refused("evaluate", tmp_path / "net.pt", *trained.options, "--threat", "inf")
    assert "did you mean resnet18" in refused(
        "evaluate", tmp_path / "net.pt", *trained.options[2:], "--model", "resnet19"
    )
