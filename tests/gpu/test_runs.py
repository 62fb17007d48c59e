"""Training runs on the GPU: data and generators there, the speed switches, and resuming."""

from dataclasses import replace

import pytest
import torch
from device_cases import DEVICE, cuda_only, gpu
from tiny_runs import PLAIN, tiny_dataset
from torch.utils._pytree import tree_map_only

from engm.adversarial import OBJECTIVES
from engm.recipes.processes import Processes
from engm.recipes.training.run import Run

pytestmark = gpu
HERE = Processes(torch.device(DEVICE))
RECORDED = replace(PLAIN, step="auto")


def trained(config, state=None):
    run = Run(config, HERE, tiny_dataset())
    if state is not None:
        run.load_state_dict(state)
    while run.epoch < config.epochs:
        run.finish_epoch(run.train_epoch(lambda: None))
    return run


@pytest.mark.parametrize("optimizer", ["engm", "a-engm", "msgd"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains(objective, optimizer):
    run = trained(replace(RECORDED, objective=objective, optimizer=optimizer, awp=objective == "mart"))
    assert {p.device.type for p in run.net.parameters()} == {HERE.device.type}
    assert run.dataset.train.labels.device.type == HERE.device.type
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in run.history)


@pytest.mark.parametrize(
    "flags", [{"precision": "bf16"}, {"channels_last": True}, {"compile_attack": True}, {"fast": True}]
)
def test_the_speed_switches_train_to_about_the_same_loss(flags):
    config = replace(RECORDED, width=8, threat="l2", eps=0.3)
    plain, fast = trained(config), trained(replace(config, **flags))
    assert fast.history[-1]["loss"] == pytest.approx(plain.history[-1]["loss"], rel=0.2)


@pytest.mark.parametrize("optimizer", ["engm", "a-engm"])
def test_a_resumed_run_ends_in_the_same_bits(optimizer):
    config = replace(RECORDED, optimizer=optimizer, ema=0.9)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first = Run(config, HERE, tiny_dataset())
        first.finish_epoch(first.train_epoch(lambda: None))
        state = tree_map_only(torch.Tensor, lambda t: t.detach().cpu().clone(), first.state_dict())
        resumed, whole = trained(config, state), trained(config)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in whole.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], tensor), name


@cuda_only
def test_attack_noise_is_drawn_on_the_device():
    run = Run(PLAIN, HERE, tiny_dataset())
    assert run.trainer.generator.device.type == "cuda"
