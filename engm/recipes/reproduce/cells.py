"""The cells of an analysis: a training run and what is measured on it; finished parts are read, not computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engm.checks import NonFiniteError

from ..config import RunConfig
from ..machine import set_machine
from ..runs.contents import RESULTS
from .measures import Measure, measured
from .statistics import Record

if TYPE_CHECKING:  # what trains is imported where it is called, because plans of cells are made without torch
    import torch

    from ..data import Dataset
    from ..runs.view import View

# What a record keeps of a run's results, and of every epoch.
KEPT_RESULTS = (
    "method", "alpha", "parameters", "data", "best_epoch", "validation", "test", "overfit", "seconds", "step_seconds",
    "machine",
)  # fmt: skip
HISTORY = ("epoch", "loss", "natural", "robust", "weight_mean", "clipped", "norm_mean", "lr")


# The data set that was loaded last: cells of one data set follow each other.
_LOADED: dict[Any, Dataset] = {}


@dataclass(frozen=True)
class Cell:
    """A run and its measures.

    Attributes:
        name: what it is, for people: ``cifar10, engm, eps 8, seed 0``.
        labels: what tells it from the other cells of its analysis, by name.
        config: settings of the run.
        measures: what is measured when the run is over.
    """

    name: str
    labels: dict[str, Any]
    config: RunConfig
    measures: tuple[Measure, ...] = field(default=())
    alone: ClassVar[bool] = False
    """Whether nothing else may compute on the machine at the same time."""

    @property
    def folder_name(self) -> str:
        """The name of the run's folder; analyses that need the same run share it."""
        config = self.config
        return f"{Path(config.data).stem}-{config.optimizer}-seed{config.seed}-{fingerprint(config)}"

    def run(
        self,
        runs: Path,
        device: torch.device,
        view: Callable[[], AbstractContextManager[View | None]] = nullcontext,
    ) -> Record:
        """Trains and measures, from wherever the cell was left.

        Args:
            runs: the folder of run folders.
            device: where to compute.
            view: makes who watches the training.

        Returns:
            The cell's record: ``name``, ``labels``, what the run came to, and ``measures`` by kind. A run that
            diverged has ``diverged`` instead.
        """
        from ..processes import Processes
        from ..runs.folder import RunFolder, train

        config = self.config.resolved()
        set_machine(config)
        dataset = dataset_of(config, device)
        folder = RunFolder(runs / self.folder_name)
        record: Record = {"name": self.name, "labels": self.labels, "folder": self.folder_name}
        try:
            with view() as watching:
                results = train(config, folder.path, Processes(device), view=watching, dataset=dataset)
            measures = {measure.kind: measured(measure, folder, config, dataset, device) for measure in self.measures}
        except NonFiniteError as error:
            return {**record, "diverged": str(error)}
        # The path of a data file is the machine's, not the result's.
        shown = {k: v for k, v in results["config"].items() if k not in ("data", "data_root")}
        return {
            **record,
            **{k: results[k] for k in KEPT_RESULTS},
            "config": shown,
            "history": [{k: row[k] for k in HISTORY if row.get(k) is not None} for row in results["history"]],
            "measures": measures,
            "measured_on": {measure.kind: measure.examples for measure in self.measures},
        }

    def is_trained(self, runs: Path) -> bool:
        """Whether the training of the cell is over."""
        return (runs / self.folder_name / RESULTS).is_file()


def fingerprint(config: RunConfig) -> str:
    """Eight digits that differ if anything differs that changes a run's result or what it keeps."""
    mine, plain = config.resolved(), RunConfig().resolved()
    told = {
        f.name: getattr(mine, f.name)
        for f in fields(RunConfig)
        if (f.metadata["outcome"] or f.name == "keep_epochs") and getattr(mine, f.name) != getattr(plain, f.name)
    }
    return hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()[:8]


def dataset_of(config: RunConfig, device: torch.device) -> Dataset:
    """The data of a run; the latest data set is kept for the next run."""
    from ..training.building import load_dataset

    names = ("data", "data_root", "download", "image_size", "validation_examples", "validation_from_test")
    key = tuple(getattr(config, name) for name in (*names, "in_memory", "train_examples", "test_examples"))
    key = (*key, str(device))
    if key not in _LOADED:
        _LOADED.clear()
        _LOADED[key] = load_dataset(config, device)
    return _LOADED[key]
