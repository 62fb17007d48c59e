"""Plans without running anything: fast, for every name and budget, and not far off in what is counted."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import count_networks
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engm.recipes.config import RunConfig
from engm.recipes.models import build_model
from engm.recipes.reproduce import ANALYSES, BUDGETS, Request, analysis, budget, forecast
from engm.recipes.reproduce.counting import counted
from engm.recipes.reproduce.forecast import NAMED, DataFacts, count_of, data_facts
from engm.recipes.reproduce.network_counts import COUNTS

CPU = "cpu"
FACTS = DataFacts(1, 1, 1, 10, (3, 32, 32))


@pytest.mark.parametrize("budget_name", BUDGETS)
def test_every_name_has_a_plan_at_once(budget_name: str, tmp_path: Path) -> None:
    for name in ANALYSES:
        settings = {} if budget_name != "small" else {"data": "cifar10"}
        start = time.process_time()
        plan = forecast(analysis(name).cells(Request(budget(budget_name), settings, (0,))), tmp_path, CPU, None)
        assert time.process_time() - start < 2, "seconds of this processor"
        assert plan.seconds > 0
        assert plan.trained == 0
        assert "still to train" in str(plan)
        assert "GiB" not in str(plan), "nobody looked at the memory"


def test_what_is_known_of_networks_is_what_is_counted() -> None:
    assert count_networks.FILE.read_text() == count_networks.text(), "run python tools/count_networks.py"
    with torch.device("meta"):
        for (model, width, shape, classes), known in COUNTS.items():
            if shape == (1, 8, 8):
                assert counted(model, width, shape, classes, "group") == known


def test_every_network_that_a_plan_names_is_known() -> None:
    for chosen in BUDGETS.values():
        for data in NAMED:
            for one in ANALYSES.values():
                for cell in one.cells(Request(chosen, {"data": data}, (0,))):
                    config = cell.config.resolved()
                    facts = data_facts(config, "cpu")
                    assert (config.model, config.width, facts.shape, facts.classes) in COUNTS


@pytest.mark.parametrize("model", ["vgg8", "wrn-10-1", "torchvision:resnet18"])
def test_operations_are_those_that_torch_counts(model: str) -> None:
    net = build_model(model, classes=10).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    assert count_of(RunConfig(data="cifar10", model=model), FACTS)[0] == counter.get_total_flops()


def test_other_networks_are_counted_too() -> None:
    config = RunConfig(data="cifar10", model="vgg8", width=5)
    assert count_of(config, FACTS) == counted("vgg8", 5, FACTS.shape, FACTS.classes, "batch")


def test_the_command_plans_without_torch(tmp_path: Path) -> None:
    code = """
import sys
from engm.recipes.cli import app
for arguments in sys.argv[2:]:
    try:
        app(["reproduce", *arguments.split(), "--plan", "--device", "cpu", "--out", sys.argv[1]])
    except SystemExit as end:
        print("ended with", end.code)
    assert "torch" not in sys.modules, arguments
"""
    planned = [f"{name} --budget {scale}" for name in (*ANALYSES, "all") for scale in BUDGETS]
    planned += ["table2 --budget paper --model vgg8 --data svhn --normalize data"]
    refused = ["tabel2", "table2 --eps 8", "table2 --data nowhere.npz --budget smal"]
    command = [sys.executable, "-c", code, str(tmp_path), *planned, *refused]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.count("still to train") == said.count("ended with 0") == len(planned)
    assert said.count("ended with 1") == len(refused)
    assert not list(tmp_path.iterdir())


def test_data_are_counted_without_being_there(tmp_path: Path) -> None:
    facts = data_facts(RunConfig(data="cifar100", test_examples=500).resolved(), CPU)
    assert (facts.train, facts.validation, facts.test, facts.classes) == (49_000, 1000, 500, 100)
    facts = data_facts(RunConfig(data="cifar10", validation_from_test=True).resolved(), CPU)
    assert (facts.train, facts.test) == (50_000, 9000)
    arrays = {"x_train": np.zeros((12, 5, 6, 3), np.uint8), "x_test": np.zeros((4, 5, 6, 3), np.uint8)}
    np.savez(tmp_path / "mine.npz", y_train=np.zeros(12, int), y_test=np.zeros(4, int), **arrays)
    facts = data_facts(RunConfig(data=str(tmp_path / "mine.npz"), validation_examples=2).resolved(), CPU)
    assert (facts.train, facts.validation, facts.test, facts.shape) == (10, 2, 4, (3, 5, 6))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        data_facts(RunConfig(data=str(tmp_path / "nowhere.npz")).resolved(), CPU)
