"""Sweeps of radii, corruptions, transfer and other norms, each against what is known of the network otherwise."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from evaluation_runs import EPS, Trained, ran, refused
from safetensors.torch import save_file

from engm.recipes.accuracy import evaluate, pgd20
from engm.recipes.data import Split
from engm.recipes.evaluation.attacks import Ball, canonical_attack, pgd_named
from engm.recipes.evaluation.corruptions import load_corruptions, mean_accuracy
from engm.recipes.models import build_model
from engm.recipes.runs.files import RunFolder
from engm.recipes.training.building import build_network

LAST = ("--checkpoint", "last")


def found(path: Path, which: str = "last") -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())[which]
    return results


@pytest.fixture
def weights(trained: Trained, tmp_path: Path) -> Path:
    """The run's weights in a file of their own, with no results beside it."""
    save_file(trained.weights, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def results(weights: Path) -> dict[str, list[dict[str, Any]]]:
    return found(weights.with_name("net.safetensors.evaluation.json"), "weights")


def file_options(trained: Trained) -> tuple[object, ...]:
    """What says which network and data a file is of, without the radius."""
    return trained.options[:-2]


def test_the_names_of_attacks() -> None:
    assert [canonical_attack(name) for name in ("PGD020", "pgd7-margin", "pgd50-CE", "AutoAttack")] == [
        "pgd20",
        "pgd7",
        "pgd50-ce",
        "autoattack",
    ]
    assert pgd_named("pgd50", Ball(0.1, "l2")) == pgd20(0.1, "l2", 50)
    with pytest.raises(ValueError, match="did you mean autoattack-rand"):
        canonical_attack("autoattack-rnd")


def test_the_ends_of_a_sweep_are_known(trained: Trained, weights: Path) -> None:
    ran("evaluate", weights, *file_options(trained), "--attack", "pgd3", "--eps-sweep", f"0,0.05,{EPS}")
    curve = json.loads(weights.with_name("net.safetensors.sweep.json").read_text())["curves"][0]
    assert (curve["weights"], curve["attack"], curve["threat"], curve["examples"]) == ("weights", "pgd3", "linf", 40)
    assert [point["eps"] for point in curve["points"]] == [0, 0.05, EPS]
    accuracies = [point["accuracy"] for point in curve["points"]]
    assert (accuracies[0], accuracies[-1]) == (trained.natural, trained.robust)
    assert trained.robust <= accuracies[1] <= trained.natural
    assert weights.with_name("net.safetensors.sweep.png").read_bytes()[:4] == b"\x89PNG"
    with mock.patch("engm.recipes.evaluation.asking.run_attack", side_effect=AssertionError("computed again")):
        ran("evaluate", weights, *file_options(trained), "--attack", "pgd3", "--eps", EPS)


def test_a_sweep_of_a_run_lies_in_its_folder(trained: Trained) -> None:
    ran("evaluate", trained.path, "--eps-sweep", "0,8/255", "--attack", "pgd2", "--attack", "pgd2-ce", *LAST)
    curves = json.loads((trained.path / "sweep.json").read_text())["curves"]
    assert [curve["attack"] for curve in curves] == ["pgd2", "pgd2-ce"]
    assert {curve["points"][0]["accuracy"] for curve in curves} == {trained.natural}
    assert (trained.path / "sweep.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--eps-sweep", "0.1,0"), "must be rising radii"),
        (("--eps-sweep", "0,x"), "--eps-sweep: expected a number"),
        (("--eps-sweep", "0,8"), "write 8/255"),
        (("--eps-sweep", "0,0.1", "--eps", "0.1"), "leave one of them out"),
        (("--eps-sweep", "0,0.1", "--attack", "natural"), "is for attacks within a radius, not for natural"),
        (("--transfer-from", "nowhere"), "nowhere is no run folder"),
        (("--transfer-from", "nowhere", "--attack", "deepfool"), "--transfer-from is for attacks within a radius"),
        (("--transfer-model", "vgg8"), "--transfer-model is for a file of weights in --transfer-from"),
        (("--examples", "41"), "examples must lie between 1 and 40"),
        (("--corruptions", "nowhere"), "nowhere/labels.npy: missing; expected a folder as CIFAR-10-C's"),
    ],
)
def test_what_is_refused(trained: Trained, weights: Path, options: tuple[str, ...], message: str) -> None:
    assert message in refused("evaluate", weights, *file_options(trained), *options)
    assert not weights.with_name("net.safetensors.evaluation.json").exists()


def test_another_norm_is_another_result(trained: Trained, weights: Path) -> None:
    evaluate_file = ("evaluate", weights, *file_options(trained), "--attack", "pgd3", "--attack", "natural")
    for threat, eps in (("linf", 8 / 255), ("l2", 128 / 255)):
        ran(*evaluate_file, "--threat", threat)
        looked = evaluate(trained.network(), trained.dataset().test, pgd20(eps, threat, 3))  # type: ignore[arg-type]
        entry = results(weights)["pgd3"][-1]
        assert (entry["threat"], entry["eps"], entry["accuracy"]) == (threat, eps, looked.robust)
    assert len(results(weights)["pgd3"]) == 2
    assert len(results(weights)["natural"]) == 1  # of which the ball is no part


def test_results_from_before_there_were_other_norms_are_read(trained: Trained, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained.path, copy, ignore=shutil.ignore_patterns("evaluation.json"))
    ran("evaluate", copy, "--attack", "pgd2", "--attack", "natural", *LAST)
    known = json.loads((copy / "evaluation.json").read_text())
    for name in ("pgd2", "natural"):
        entry = known["last"][name][0]
        entry.pop("threat", None)
        entry["eps"] = EPS
    (copy / "evaluation.json").write_text(json.dumps(known))
    with mock.patch("engm.recipes.evaluation.asking.run_attack", side_effect=AssertionError("computed again")):
        ran("evaluate", copy, "--attack", "pgd2", "--attack", "natural", *LAST)
    ran("evaluate", copy, "--attack", "pgd2", "--threat", "l2", "--eps", EPS, *LAST)
    assert len(found(copy / "evaluation.json")["pgd2"]) == 2


# -- corruptions -----------------------------------------------------------------------------------------------------


def write_corruptions(folder: Path, trained: Trained) -> dict[str, list[Split]]:
    """Three corruptions by hand: none at all, darkness that grows, and one of those that do not count."""
    test = trained.dataset().test
    images = (test.batch(torch.arange(40))[0] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    labels = np.tile(test.labels.numpy(), 5)
    folder.mkdir()
    severities = {
        "none": [images] * 5,
        "fog": [(images * (1 - 0.2 * level)).astype(np.uint8) for level in range(5)],
        "saturate": [np.zeros_like(images)] * 5,
    }
    for name, parts in severities.items():
        np.save(folder / f"{name}.npy", np.concatenate(parts))
    np.save(folder / "labels.npy", labels)
    return {
        name: [Split(torch.from_numpy(part).permute(0, 3, 1, 2).contiguous(), test.labels) for part in parts]
        for name, parts in severities.items()
    }


def test_corruptions_one_severity_after_the_other(trained: Trained, weights: Path, tmp_path: Path) -> None:
    splits = write_corruptions(tmp_path / "C", trained)
    output = ran("evaluate", weights, *file_options(trained), "--corruptions", tmp_path / "C")
    known = results(weights)
    assert known.keys() == {"corruption-none", "corruption-fog", "corruption-saturate"}
    for name, parts in splits.items():
        entry = known[f"corruption-{name}"][0]
        assert entry["severities"] == [evaluate(trained.network(), part).natural for part in parts]
        assert entry["accuracy"] == pytest.approx(sum(entry["severities"]) / 5)
    assert known["corruption-none"][0]["severities"] == [trained.natural] * 5
    mean = (known["corruption-none"][0]["accuracy"] + known["corruption-fog"][0]["accuracy"]) / 2
    line = next(line for line in output.splitlines() if "mean without saturate" in line)
    assert f"{mean:.2%}" in line
    with mock.patch("engm.recipes.evaluation.corruptions.evaluate", side_effect=AssertionError("computed again")):
        ran("evaluate", weights, *file_options(trained), "--corruptions", tmp_path / "C")
    ran("evaluate", weights, *file_options(trained), "--corruptions", tmp_path / "C", "--examples", 7)
    few = results(weights)["corruption-fog"][1]
    assert few["severities"][4] == evaluate(trained.network(), splits["fog"][4].take(torch.arange(7))).natural


def test_changed_corruptions_are_computed_anew(trained: Trained, weights: Path, tmp_path: Path) -> None:
    write_corruptions(tmp_path / "C", trained)
    arguments = ("evaluate", weights, *file_options(trained), "--corruptions", tmp_path / "C")
    ran(*arguments)
    fog = np.load(tmp_path / "C" / "fog.npy")
    fog[-1, 0, 0, 0] += 1
    np.save(tmp_path / "C" / "fog.npy", fog)
    ran(*arguments)
    known = results(weights)
    assert (len(known["corruption-fog"]), len(known["corruption-none"])) == (2, 1)


def test_folders_that_are_none_of_corruptions(trained: Trained, tmp_path: Path) -> None:
    write_corruptions(tmp_path / "C", trained)
    shape = (3, 8, 8)
    assert mean_accuracy({"saturate": 0.5}) == 0.5  # there is no other
    with pytest.raises(ValueError, match=r"fog.npy: expected uint8 \[200, 8, 8, 1\], got uint8 \[200, 8, 8, 3\]"):
        load_corruptions(tmp_path / "C", (1, 8, 8), 3, None)
    with pytest.raises(ValueError, match=r"labels.npy: labels must be class indices from 0 to 1"):
        load_corruptions(tmp_path / "C", shape, 2, None)
    with pytest.raises(ValueError, match="examples must lie between 1 and 40, the images of a severity"):
        load_corruptions(tmp_path / "C", shape, 3, 41)
    np.save(tmp_path / "C" / "labels.npy", np.zeros(201, np.int64))
    with pytest.raises(ValueError, match=r"expected integers \[5 n\]"):
        load_corruptions(tmp_path / "C", shape, 3, None)
    (tmp_path / "C" / "labels.npy").write_bytes(b"no")
    with pytest.raises(ValueError, match="not an array of numpy's"):
        load_corruptions(tmp_path / "C", shape, 3, None)


# -- transfer --------------------------------------------------------------------------------------------------------


def test_transfer_takes_all_steps(trained: Trained, weights: Path) -> None:
    """Not only those until the network that examples are made on is wrong: other networks are still right there."""
    options = file_options(trained)
    for source in (weights, trained.path):
        ran("evaluate", weights, *options, "--eps", EPS, "--attack", "pgd3", "--transfer-from", source)
    ran("evaluate", trained.path, *LAST, "--attack", "pgd3", "--transfer-from", trained.path)
    (entry, *others) = results(weights)["transfer-pgd3"]
    net, test = trained.network(), trained.dataset().test
    x, y = test.batch(torch.arange(len(test)))
    attack = replace(pgd20(EPS, steps=3), stop_when_broken=False)
    made = attack(net, x, y, generator=torch.Generator().manual_seed(0)).inputs
    assert entry["accuracy"] == pytest.approx(float((net(made).argmax(1) == y).float().mean()))
    # The run's own best network is another source, unless best is last.
    assert len(others) <= 1
    assert found(trained.path / "evaluation.json")["transfer-pgd3"][-1]["accuracy"] == entry["accuracy"]


def test_transfer_from_another_network(trained: Trained, weights: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = build_model("vgg8", classes=3, in_channels=3, image_size=8, width=2).eval()
    torch.save({"net": other.state_dict()}, tmp_path / "other.pt")
    options = ("--attack", "pgd3", "--transfer-from", tmp_path / "other.pt", "--eps", EPS)
    assert "with --transfer-model of which network" in refused("evaluate", trained.path, *LAST, *options)
    ran("evaluate", trained.path, *LAST, *options, "--transfer-model", "vgg8", "--width", 2)
    entry = found(trained.path / "evaluation.json")["transfer-pgd3"][-1]
    assert entry["made_on"]["model"] == "vgg8"
    test = trained.dataset().test
    x, y = test.batch(torch.arange(40))
    attack = replace(pgd20(EPS, steps=3), stop_when_broken=False)
    made = attack(other, x, y, generator=torch.Generator().manual_seed(0)).inputs
    right = float((trained.network()(made).argmax(1) == y).float().mean())
    looked = evaluate(trained.network(), test, attack, made_on=other)
    assert entry["accuracy"] == looked.robust == pytest.approx(right)
    assert looked.robust != trained.robust


def test_answers_are_of_the_weights_and_not_of_a_name(trained: Trained, tmp_path: Path) -> None:
    """A folder that was trained anew has checkpoints of the same names."""
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    ran("evaluate", run, *LAST, "--attack", "pgd3")
    before = found(run / "evaluation.json")["pgd3"][-1]["accuracy"]
    folder = RunFolder(run)
    name, state = folder.store.latest("step-")
    state["net"] = {key: 0.9 * t if t.is_floating_point() else t for key, t in state["net"].items()}
    shutil.rmtree(run / "checkpoints" / name)
    folder.store.save(name, state)
    ran("evaluate", run, *LAST, "--attack", "pgd3")
    after = found(run / "evaluation.json")["pgd3"]
    assert len({entry["weights"] for entry in after}) == len(after) >= 2
    net = build_network(folder.config(), trained.dataset())
    net.load_state_dict(folder.weights("last").weights)
    test = trained.dataset().test
    assert after[-1]["accuracy"] == evaluate(net.eval(), test, pgd20(EPS, steps=3)).robust
    assert after[-2]["accuracy"] == before


def test_autoattack_tells_what_each_attack_leaves(trained: Trained, weights: Path) -> None:
    arguments = (
        "evaluate",
        weights,
        *file_options(trained),
        "--examples",
        5,
        "--eps",
        "0.02",
        "--attack",
        "autoattack-untargeted",
    )
    assert "take --attack autoattack-untargeted" in refused(*arguments[:-1], "autoattack")
    with mock.patch("engm.recipes.evaluation.attacks.autoattack") as attack:
        attack.return_value = mock.Mock(
            robust=0.2, reported=0.2, per_attack={"clean": 0.6, "apgd-ce": 0.4, "square": 0.2}, warnings=("randomised",)
        )
        output = ran(*arguments)
        ran(*arguments[:-1], "autoattack-rand")
    assert [call.kwargs["version"] for call in attack.call_args_list] == ["custom", "rand"]
    assert attack.call_args.kwargs["eps"] == 0.02
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert "after apgd-ce 40.00%" in lines
    assert "weights, autoattack-untargeted: randomised" in lines
    assert results(weights)["autoattack-untargeted"][0]["attacks"]["square"] == 0.2
