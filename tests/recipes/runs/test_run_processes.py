"""Two gloo processes train a run as one process does."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import free_port, joined
from tiny_runs import PLAIN, tiny_dataset

from engm.recipes.config import RunConfig
from engm.recipes.processes import Processes, from_environment
from engm.recipes.runs.folder import NoView, RunFolder, train

# l2: the sign of an l-inf step turns rounding errors into whole steps.
BASE = replace(PLAIN, norm="group", threat="l2", eps=0.4, epochs=2)
RUNS = {
    "pgd, engm": BASE,
    "pgd, a-engm": replace(BASE, optimizer="a-engm", tau=2, alpha="3"),
    "pgd, n-engm": replace(BASE, optimizer="n-engm"),
    "pgd, auto": replace(BASE, alpha="auto"),
    "trades, engm": replace(BASE, objective="trades"),
    "mart with AWP, mgnc": replace(BASE, objective="mart", awp=True, optimizer="mgnc", max_norm=0.5),
    "fat, msgd, averaged": replace(BASE, objective="fat", patience=1, optimizer="msgd", ema=0.9),
    "own pass, f-engm": replace(BASE, borrow=False, optimizer="f-engm", lr=0.01),
}
BATCH_NORM = replace(PLAIN, epochs=2, save_every=1, objective="trades")


class Stops(NoView):
    """Stops every process after three steps; in a run of several, every process watches."""

    def __init__(self) -> None:
        self.left = 3

    def on_step(self) -> None:
        self.left -= 1
        if not self.left:
            raise InterruptedError


def work(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with from_environment("cpu") as processes:
        for name, config in RUNS.items():
            train(config, folder / name, processes, dataset=tiny_dataset())
        # Batch norm: statistics are each process's own, so only resuming is compared.
        train(BATCH_NORM, folder / "batch norm", processes, dataset=tiny_dataset())
        train(
            replace(BATCH_NORM, save_every=100), folder / "batch norm, rarely saved", processes, dataset=tiny_dataset()
        )
        stopped = folder / "batch norm, stopped"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("engm.recipes.runs.folder.NoView", Stops)
            with pytest.raises(InterruptedError):
                train(BATCH_NORM, stopped, processes, dataset=tiny_dataset())
        dist.barrier()
        train(BATCH_NORM, stopped, processes, dataset=tiny_dataset())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of two processes."""
    folder = tmp_path_factory.mktemp("pair")
    joined(work, (free_port(), folder), 2)
    return folder


def kept(folder: Path) -> dict[str, Any]:
    _, state = RunFolder(folder).store.latest() or ("", {})
    return dict(state)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(pair: Path, tmp_path: Path, name: str) -> None:
    config: RunConfig = RUNS[name]
    one = train(config, tmp_path / "run", Processes(torch.device("cpu")), dataset=tiny_dataset())
    two = RunFolder(pair / name).results()
    alone, together = kept(tmp_path / "run")["net"], kept(pair / name)["net"]
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, rtol=1e-3, atol=2e-5, msg=f"{name}: {key}")
    assert two["machine"]["processes"] == 2
    for mine, other in zip(two["history"], one["history"], strict=True):
        assert abs(mine["robust"] - other["robust"]) <= 1 / 14 + 1e-9  # one of 14 validation images at most


def test_saving_changes_nothing(pair: Path) -> None:
    often, rarely = kept(pair / "batch norm"), kept(pair / "batch norm, rarely saved")
    assert all(torch.equal(rarely["net"][key], tensor) for key, tensor in often["net"].items())


def test_resuming_two_processes_ends_in_the_same_bits(pair: Path) -> None:
    whole, stopped = kept(pair / "batch norm"), kept(pair / "batch norm, stopped")
    assert all(torch.equal(stopped["net"][key], tensor) for key, tensor in whole["net"].items())
    assert stopped["history"][-1]["robust"] == whole["history"][-1]["robust"]
