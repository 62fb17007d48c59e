"""Optimizers saved in a checkpoint go on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import assert_same, batch, losses_of, network, sgd

import engm
from engm.recipes.storage.checkpoint import CheckpointStore


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


@pytest.mark.parametrize("make", [sgd, lambda net: torch.optim.Adam(net.parameters(), 0.01, amsgrad=True)])
def test_torch_optimizers_resume_bit_for_bit(store: CheckpointStore, make: Any) -> None:
    def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            losses_of(net, *batch(4, seed=step)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    net = network("batch")
    optimizer = make(net)
    train(net, optimizer, 0, 3)
    store.save("step-3", {"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    train(net, optimizer, 3, 6)
    resumed = network("batch", seed=1)
    resumed_optimizer = make(resumed)
    saved = store.load("step-3")
    resumed.load_state_dict(saved["net"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    train(resumed, resumed_optimizer, 3, 6)
    assert_same(resumed.state_dict(), net.state_dict())
    assert_same(resumed_optimizer.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("method", [engm.ENGM, engm.AENGM])
def test_our_optimizers_resume_bit_for_bit(store: CheckpointStore, method: Any) -> None:
    def make(seed: int) -> tuple[engm.GradNormModule, engm.ExampleOptimizer]:
        model = engm.GradNormModule(network("batch", seed=seed), calibrate_every=3, calibrate_examples=4)
        return model, method(model, sgd(model), 5.0)

    def train(model: engm.GradNormModule, optimizer: engm.ExampleOptimizer, first: int, last: int) -> None:
        for step in range(first, last):
            x, y = batch(6, seed=step)
            optimizer.backward(losses_of(model, x, y), x)
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = make(seed=0)
    train(model, optimizer, 0, 4)
    assert optimizer.state_dict()["engm"]["calibration"]["factors"], "calibration is part of what must come back"
    store.save("step-4", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, 4, 8)
    resumed, resumed_optimizer = make(seed=1)
    saved = store.load("step-4")
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    train(resumed, resumed_optimizer, 4, 8)
    assert_same(resumed.state_dict(), model.state_dict())
    assert_same(resumed_optimizer.state_dict(), optimizer.state_dict())
