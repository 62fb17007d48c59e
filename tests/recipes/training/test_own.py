"""Objectives and optimizers of one's own: trained with, resumed, and refused where they are none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import PLAIN, tiny_dataset
from torch import nn

import engm
from engm.recipes.processes import Processes
from engm.recipes.runs.compare import cells_of
from engm.recipes.runs.folder import RunFolder, train
from engm.recipes.runs.view import NoView
from engm.recipes.training.own import check_objective, own_objective, own_optimizer
from engm.recipes.training.run import Run

SOURCE = """
import torch
import torch.nn.functional as F
import engm
from engm.adversarial import PGD, LabelAverages, Objective, cross_entropy, objective

def twice(model, x, x_adv, y):
    return cross_entropy(model(x), y) + cross_entropy(model(x_adv), y)

def as_pgd(model, x, x_adv, y):
    return cross_entropy(model(x_adv), y)

def mean(model, x, x_adv, y):
    return cross_entropy(model(x_adv), y).mean()

PGD_AGAIN = Objective("again", as_pgd, True, objective("pgd").attack)
KEEPS = Objective("keeps", as_pgd, True, objective("pgd").attack, LabelAverages(torch.zeros(3, dtype=torch.int64), 2))
number = 3

def half(model, sgd):
    return engm.ENGM(model, sgd, alpha=0.5)

class Half(engm.ExampleOptimizer):
    uses_norms = True

    def weights(self, norms):
        return engm.optim.weights.Weighting(torch.full_like(norms.losses, 0.5))

def plain(model, sgd):
    return sgd
"""

CPU = Processes(torch.device("cpu"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "own_training.py").write_text(SOURCE)
    return tmp_path / "own_training.py"


def weights_after(path: Path, **settings: object) -> dict[str, torch.Tensor]:
    train(replace(PLAIN, epochs=1, **settings), path, CPU, dataset=tiny_dataset())  # type: ignore[arg-type]
    return RunFolder(path).weights("last").weights


def same(mine: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, others[name]) for name, tensor in mine.items())


def test_pgd_written_again_is_pgd(file: Path, tmp_path: Path) -> None:
    pgd = weights_after(tmp_path / "pgd", attack_mode="train")
    assert same(weights_after(tmp_path / "again", objective=f"{file}:PGD_AGAIN", attack_mode="train"), pgd)
    other = weights_after(tmp_path / "twice", objective=f"{file}:twice", attack_mode="train")
    assert not same(other, pgd)


def test_a_plain_function_is_assumed_to_be_trained_on_pgd_in_evaluation_mode(file: Path) -> None:
    found = own_objective(f"{file}:as_pgd", eval_mode=True)
    assert (found.name, found.attack_maximises_it) == ("own_training.as_pgd", False)
    assert found.attack(0.1, 0.05, 3, "l2") == engm.adversarial.objective("pgd").attack(0.1, 0.05, 3, "l2")
    assert not own_objective(f"{file}:PGD_AGAIN", eval_mode=False).attack(0.1, 0.05, 3, "linf").eval_mode
    config = replace(PLAIN, objective=f"{file}:as_pgd")
    assert config.resolved().attack_mode == "eval"
    assert Run(config, CPU, tiny_dataset()).trainer.attack == found.attack(0.2, 0.05, 2, "linf")


def test_an_objective_that_keeps_something_is_refused(file: Path) -> None:
    with pytest.raises(
        ValueError, match=r"own_training.py:KEEPS keeps something beside the network, which a run would"
    ):
        own_objective(f"{file}:KEEPS", eval_mode=True)


def test_an_optimizer_written_again_is_the_optimizer(file: Path, tmp_path: Path) -> None:
    mine = weights_after(tmp_path / "half", optimizer=f"{file}:half")
    assert same(mine, weights_after(tmp_path / "engm", optimizer="engm", alpha="0.5"))
    assert RunFolder(tmp_path / "half").results()["method"] == "own_training.half"
    halved = weights_after(tmp_path / "class", optimizer=f"{file}:Half", momentum=0.0, weight_decay=0.0)
    assert not same(halved, mine)


def test_a_run_goes_on_from_its_folder(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    config = replace(PLAIN, epochs=2, objective="own_training.py:twice", optimizer="own_training.py:half")
    train(config, tmp_path / "whole", CPU, dataset=tiny_dataset())

    class Killed(NoView):
        def on_epoch(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "killed", CPU, dataset=tiny_dataset(), view=Killed())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = RunFolder(tmp_path / "killed").config()
    assert found.objective == f"{file}:twice"
    train(found, tmp_path / "killed", CPU, dataset=tiny_dataset())
    ends = [RunFolder(tmp_path / name).weights("last") for name in ("whole", "killed")]
    assert (ends[0].epoch, ends[1].epoch) == (2, 2)
    assert same(ends[0].weights, ends[1].weights)
    file.write_text(SOURCE.replace("alpha=0.5", "alpha=0.4"))
    with pytest.warns(UserWarning, match="the file is another one") as said:
        train(replace(found, epochs=3), tmp_path / "killed", CPU, dataset=tiny_dataset())
    text = " ".join(str(warning.message) for warning in said)
    for name in ("objective", "optimizer"):
        assert f"--{name} {getattr(found, name)}: the file is another one than this run was trained with so far" in text


def test_what_is_refused(file: Path, tmp_path: Path) -> None:
    net = engm.GradNormModule(nn.Linear(2, 2))
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"must be an engm.adversarial.Objective or a function .* got a int"):
        own_objective(f"{file}:number", eval_mode=True)
    with pytest.raises(ValueError, match="got the class Half"):
        own_objective(f"{file}:Half", eval_mode=True)
    with pytest.raises(ValueError, match=r"which weighs examples, and returned a SGD; engm.MSGD\(model, optimizer\)"):
        own_optimizer(f"{file}:plain", net, sgd)
    with pytest.raises(ValueError, match="failed: TypeError"):
        own_optimizer(f"{file}:twice", net, sgd)
    with pytest.raises(ValueError, match=r"^\S*:mean must return one loss an example, \[2\], and returned \[\]: .*\)$"):
        weights_after(tmp_path / "run", objective=f"{file}:mean")
    with pytest.raises(ValueError, match=r"half, called with \(model, x, x_adv, y\), failed: TypeError"):
        weights_after(tmp_path / "run", objective=f"{file}:half")
    assert not (tmp_path / "run").exists()


def test_looking_at_an_objective_changes_nothing(file: Path) -> None:
    net = Run(PLAIN, CPU, tiny_dataset()).net.train()
    before, random = {name: tensor.clone() for name, tensor in net.state_dict().items()}, torch.get_rng_state()
    check_objective(own_objective(f"{file}:twice", eval_mode=True), "twice", net, (1, 8, 8))
    assert same(before, net.state_dict())
    assert torch.equal(random, torch.get_rng_state())
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())


def test_compared_with_others(file: Path) -> None:
    cells = cells_of(PLAIN, ["msgd", f"{file}:half"], [0, 3])
    assert list(cells) == ["msgd-seed0", "own_training.half-seed0", "msgd-seed3", "own_training.half-seed3"]
    assert cells["own_training.half-seed3"].optimizer == f"{file}:half"
    with pytest.raises(ValueError, match="expected different optimizers"):
        cells_of(PLAIN, [f"{file}:half", f"elsewhere/{file.name}:half"], [0])
