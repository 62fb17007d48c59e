"""Two gloo processes train a run as one process does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from little_network import COUPLED
from processes import free_port, joined
from tiny_runs import PLAIN, tiny_dataset
from torch import Tensor

from engm.checks import RefusedError
from engm.recipes.config import RunConfig
from engm.recipes.data import Dataset, Split
from engm.recipes.processes import Processes, from_environment
from engm.recipes.runs.folder import RunFolder, train
from engm.recipes.runs.view import NoView

# l2: the sign of an l-inf step turns rounding errors into whole steps.
BASE = replace(PLAIN, norm="group", threat="l2", eps=0.4, epochs=2)
# Half a batch rounds differently from the whole one, and TRADES' attack enlarges that: it starts a thousandth from the
# image, where the two predictions whose difference drives it agree to four digits. In float32, on a CPU with AVX-512,
# logits differ by 1e-7, the examples of PGD and MART by 1e-7 too, those of TRADES by 8e-5, and the weights after two
# epochs by 4e-5. In float64 the weights differ by 2e-16, so that rounding cannot hide a mistake.
TOLERANCE = {"rtol": 0.0, "atol": 1e-9}
RUNS = {
    "pgd, engm": BASE,
    "pgd, a-engm": replace(BASE, optimizer="a-engm", tau=2, alpha="3"),
    "pgd, n-engm": replace(BASE, optimizer="n-engm"),
    "pgd, auto": replace(BASE, alpha="auto"),
    "trades, engm": replace(BASE, objective="trades"),
    "mart with AWP, mgnc": replace(BASE, objective="mart", awp=True, optimizer="mgnc", max_norm=0.5),
    "fat, msgd, averaged": replace(BASE, objective="fat", patience=1, optimizer="msgd", ema=0.9),
    "normalized, smoothed, evenly averaged": replace(
        BASE, normalize="0.5/0.25", label_smoothing=0.1, schedule="cosine", warmup=0.5, swa_start=1
    ),
    "backward smoothing, engm": replace(BASE, objective="backward-smoothing"),
    "lbgat, engm": replace(BASE, objective="lbgat", beta=1.0),
    "lbgat in parts, msgd": replace(BASE, eps=0.0, objective="lbgat", optimizer="msgd", accumulate=2),
    "self-adaptive, engm": replace(BASE, objective="self-adaptive", sat_start=1),
    "in parts, mgnc": replace(BASE, eps=0.0, accumulate=2, optimizer="mgnc", max_norm=0.5),
    "own pass, f-engm": replace(BASE, borrow=False, optimizer="f-engm", lr=0.01),
}
BATCH_NORM = replace(PLAIN, epochs=2, save_every=1, objective="trades")


class DoubleSplit(Split):
    """Batches in float64."""

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        x, y = super().batch(rows)
        return x.double(), y

    def to(self, device: torch.device | str) -> DoubleSplit:
        return DoubleSplit(self.inputs.to(device), self.labels.to(device))


@contextmanager
def in_double() -> Iterator[Dataset]:
    """The tiny data set with float64 images, while new networks have float64 parameters."""
    dataset = tiny_dataset()
    splits = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield replace(dataset, **{name: DoubleSplit(s.inputs, s.labels) for name, s in splits.items()})
    finally:
        torch.set_default_dtype(before)


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
        with in_double() as dataset:
            for name, config in RUNS.items():
                train(config, folder / name, processes, dataset=dataset)
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


def everything(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the network, and of what the objective keeps beside."""
    beside = state["beside"] or {}
    return {**state["net"], **{f"beside.{key}": value for key, value in (beside.get("net") or beside).items()}}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(pair: Path, tmp_path: Path, name: str) -> None:
    config: RunConfig = RUNS[name]
    with in_double() as dataset:
        one = train(config, tmp_path / "run", Processes(torch.device("cpu")), dataset=dataset)
    two = RunFolder(pair / name).results()
    alone, together = (everything(kept(folder)) for folder in (tmp_path / "run", pair / name))
    assert alone.keys() == together.keys()
    for key, tensor in alone.items():
        assert tensor.dtype in (torch.float64, torch.int64), key
        torch.testing.assert_close(together[key], tensor, **TOLERANCE, msg=lambda text: f"{name}: {key}: {text}")  # noqa: B023
    assert two["machine"]["processes"] == 2
    for mine, other in zip(two["history"], one["history"], strict=True):
        assert mine["robust"] == other["robust"]


def test_saving_changes_nothing(pair: Path) -> None:
    often, rarely = kept(pair / "batch norm"), kept(pair / "batch norm, rarely saved")
    assert all(torch.equal(rarely["net"][key], tensor) for key, tensor in often["net"].items())


def test_resuming_two_processes_ends_in_the_same_bits(pair: Path) -> None:
    whole, stopped = kept(pair / "batch norm"), kept(pair / "batch norm, stopped")
    assert all(torch.equal(stopped["net"][key], tensor) for key, tensor in whole["net"].items())
    assert stopped["history"][-1]["robust"] == whole["history"][-1]["robust"]


def be_refused(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    config = replace(PLAIN, model=f"{folder}/net.py:Net", width=None)
    with (
        from_environment("cpu") as processes,
        pytest.raises(
            RefusedError, match=r"on rank 0 of 2, which stops all of them: .* influences the losses of other"
        ),
    ):
        train(config, folder / "runs" / "one", processes, dataset=tiny_dataset())


def test_what_is_refused_in_two_processes_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(COUPLED)
    joined(be_refused, (free_port(), tmp_path), 2)
    assert not (tmp_path / "runs").exists()
