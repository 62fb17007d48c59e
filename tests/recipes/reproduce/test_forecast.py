"""Plans without running anything: fast, for every name and budget, and not far off in what is counted."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engm.recipes.config import RunConfig
from engm.recipes.models import build_model
from engm.recipes.reproduce import ANALYSES, BUDGETS, Request, analysis, budget, forecast
from engm.recipes.reproduce.forecast import DataFacts, count_of, counted, data_facts

CPU = torch.device("cpu")
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


@pytest.mark.parametrize("model", ["small-resnet", "resnet18", "preact-resnet18", "vgg8", "wrn-16-1", "wrn-10-1"])
def test_what_is_known_of_networks_is_what_a_forward_pass_counts(model: str) -> None:
    for width in (None, 8):
        config = RunConfig(data="cifar10", model=model, width=width)
        known, modules = count_of(config, FACTS)
        operations, there = counted(config, FACTS)
        assert known == pytest.approx(operations, rel=0.01 if width is None else 0.6)
        assert modules == there


@pytest.mark.parametrize("model", ["vgg8", "wrn-10-1", "torchvision:resnet18"])
def test_operations_are_those_that_torch_counts(model: str) -> None:
    net = build_model(model, classes=10).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    assert counted(RunConfig(data="cifar10", model=model), FACTS)[0] == counter.get_total_flops()


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
