"""A run on disk: where things lie, how it is resumed, and the loop that trains it to the end.

DIR/config.toml       the resolved configuration
DIR/checkpoints/      step-NNNNNNNN (the last two), best-NNNNNNNN (by validation) and epoch-NNNNNN (--keep-epochs)
DIR/log/              step.csv, epoch.csv, TensorBoard events
DIR/results.json      when it is over: test accuracy of best and last, every epoch's figures, the machine
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from torch import Tensor

from ..accuracy import Accuracy, overfit
from ..config import RunConfig, from_values, option, read_toml, to_toml
from ..data import Dataset, check_same_data, identities
from ..machine import machine_facts
from ..methods import label_of
from ..processes import Processes
from ..storage.atomic_files import read_json, write_json, write_text_atomic
from ..storage.checkpoint import CheckpointError, CheckpointStore
from ..storage.folder_lock import locked
from ..training.loggers import LogFormat, Loggers
from ..training.run import Run, robust_of
from .contents import described, holds_run
from .termination import TerminatedError, Termination, noted
from .view import NoView, View

LAST = "step-"
BEST = "best-"
EPOCH = "epoch-"
KEPT = 2  # periodic checkpoints: the latest and one to fall back on
Which = Literal["best", "last"]


@dataclass(frozen=True)
class RunFolder:
    """The files of a run.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """The file of the resolved configuration."""
        return self.path / "config.toml"

    @property
    def results_file(self) -> Path:
        """The file that says what the run came to."""
        return self.path / "results.json"

    @property
    def store(self) -> CheckpointStore:
        """The checkpoints of the run."""
        return CheckpointStore(self.path / "checkpoints", keep=KEPT)

    @property
    def exists(self) -> bool:
        """Whether a run lives here already."""
        return holds_run(self.path)

    def config(self, data_root: Path | None = None) -> RunConfig:
        """The resolved configuration of the run that lives here.

        Args:
            data_root: where named data sets lie now, if not where they lay in training.

        Raises:
            FileNotFoundError: no run lives here.
            ValueError: its configuration cannot be read.
        """
        if not self.exists:
            raise FileNotFoundError(f"{self.path} is no run folder: the path {described(self.path)}")
        config = from_values(read_toml(self.config_file), source=str(self.config_file)).resolved()
        return config if data_root is None else replace(config, data_root=str(data_root.absolute()))

    def check_free_for(self, config: RunConfig) -> None:
        """Looks whether ``config`` may train here: in a new or empty folder, or going on with its own run.

        Raises:
            ValueError: another run lives here, or something else.
        """
        if self.exists and (self.results_file.is_file() or self.store.names(LAST)):
            differences = config.differences(self.config())
            if differences:
                listed = ", ".join(f"{option(k)} {old} (now {new})" for k, (new, old) in differences.items())
                raise ValueError(
                    f"{self.path} holds a run with other settings: {listed}. Choose another --out, or leave these "
                    "settings out to go on with it."
                )
        elif not self.exists and self.path.exists() and not _is_empty_folder(self.path):
            raise ValueError(
                f"{self.path} exists and is no run folder: the path {described(self.path)}. Choose another --out"
            )

    @property
    def evaluations_file(self) -> Path:
        """The file that says what ``engm evaluate`` found."""
        return self.path / "evaluation.json"

    def results(self) -> dict[str, Any]:
        """What the run came to.

        Raises:
            FileNotFoundError: the run is not over.
        """
        if not self.results_file.is_file():
            raise FileNotFoundError(f"{self.path} has no results yet: train it to the end with engm train --out")
        found: dict[str, Any] = read_json(self.results_file)
        return found

    def weights(self, which: Which) -> Kept:
        """The weights of the best or the last checkpoint.

        Args:
            which: ``"best"`` on the validation set so far, or ``"last"``.

        Raises:
            FileNotFoundError: no such checkpoint yet.
            CheckpointError: it is damaged; names the file.
        """
        found = self.store.latest(LAST)
        if found is None or (which == "best" and found[1]["best"] is None):
            raise FileNotFoundError(f"{self.path} has no {which} checkpoint yet")
        name, state = found
        if which == "last":
            return Kept(name, state["epoch"], evaluated_weights(state))
        name = best_name(state["best"]["steps"])
        return Kept(name, state["best"]["epoch"], self.store.load(name)["net"])

    def weights_after(self, epoch: int) -> Kept:
        """The weights after an epoch of ``--keep-epochs``.

        Raises:
            CheckpointError: they were not kept, or are damaged.
        """
        name = f"{EPOCH}{epoch:06d}"
        return Kept(name, epoch, self.store.load(name)["net"])

    # -- writing ---------------------------------------------------------------------------------------------------

    def save(self, run: Run) -> None:
        """Saves a periodic checkpoint. Every process must call this; the first one writes."""
        self.save_state(run, run.state_dict())

    def save_state(self, run: Run, state: dict[str, Any]) -> None:
        """Saves a periodic checkpoint of a state that was taken after the latest step. Every process must call this."""
        with run.processes.together():
            if run.processes.first:
                self.store.save(f"{LAST}{run.trainer.steps:08d}", state)
                self.store.prune(LAST)

    def save_best(self, run: Run) -> None:
        """Saves the weights that were just found to be the best. Every process must call this; the first one writes."""
        with run.processes.together():
            if run.processes.first and run.best is not None:
                accuracy = asdict(run.best.accuracy)
                weights = {"epoch": run.epoch, "net": run.evaluated.state_dict(), "accuracy": accuracy}
                self.store.save(best_name(run.best.steps), weights)
                # Two stay: a resumed run may still start from a periodic checkpoint that was written before these
                # weights were, and the best of that one are the weights before.
                self.store.prune(BEST)

    def save_epoch(self, run: Run) -> None:
        """Saves the weights that evaluation looks at after the epoch just finished. Every process must call this."""
        with run.processes.together():
            if run.processes.first:
                weights = {"epoch": run.epoch, "net": run.evaluated.state_dict()}
                self.store.save(f"{EPOCH}{run.epoch:06d}", weights)

    def restore(self, run: Run) -> bool:
        """Puts the run where its latest good checkpoint left it; a damaged one is named in a warning and passed over.

        Returns:
            Whether there was a checkpoint.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.
        """
        found = self.store.latest(LAST)
        if found is not None:
            run.load_state_dict(found[1])
        if run.processes.first:  # newer best weights belong to a future that this run may not repeat
            self.store.drop_after(BEST, run.trainer.steps)
        return found is not None


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and all(entry.name.startswith(".") for entry in path.iterdir())


@dataclass(frozen=True)
class Kept:
    """Weights out of a checkpoint.

    Attributes:
        checkpoint: name of the checkpoint.
        epoch: number of finished epochs.
        weights: the network's ``state_dict`` (averaged weights, if the run averages), on the CPU.
    """

    checkpoint: str
    epoch: int
    weights: dict[str, Tensor]


def best_name(steps: int) -> str:
    """The checkpoint of weights that were the best after so many steps."""
    return f"{BEST}{steps:08d}"


def evaluated_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a periodic checkpoint that evaluation looks at: the averaged ones, if there are any."""
    if state["average"] is None:
        net: dict[str, Tensor] = state["net"]
        return net
    prefix = "module."
    return {name.removeprefix(prefix): t for name, t in state["average"].items() if name.startswith(prefix)}


def train(
    config: RunConfig, path: Path, processes: Processes, *, view: View | None = None, dataset: Dataset | None = None
) -> dict[str, Any]:
    """Trains a run to its end in a folder, from wherever it was left.

    Args:
        config: settings of the run.
        path: folder of the run; it is made when everything that can be checked before training has been.
        processes: the processes that train it together; they must see the same folder.
        view: who watches.
        dataset: ``None`` to load the one that the configuration names.

    Returns:
        The results, as ``results.json`` holds them.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: something does not fit; nothing was written.
        NonFiniteError: training diverged; the last good checkpoint is kept.
        TerminatedError: SIGTERM came; the state at that batch is kept.
        CheckpointError: all checkpoints are damaged.
        OSError: the disk is full, say; what was saved before is whole.
    """
    config = config.resolved()
    folder = RunFolder(path)
    folder.check_free_for(config)
    if folder.results_file.is_file():
        results = folder.results()
        if dataset is not None and "identity" in results["data"]:
            check_same_data(results["data"]["identity"], identities(dataset), dataset.name)
        return results
    formats = [LogFormat(name) for name in config.loggers]
    for kind in formats:
        kind.check()
    run = Run(config, processes, dataset)
    view = view if view is not None and processes.first else NoView()
    with ExitStack() as stack:
        with processes.together():
            if processes.first:
                stack.enter_context(locked(path))
                folder.check_free_for(config)  # once more, since somebody may have begun meanwhile
                if not folder.exists or not folder.store.names(LAST):  # nothing was trained with other settings
                    write_text_atomic(folder.config_file, to_toml(config))
        resumed = folder.restore(run)
        if processes.first and formats:
            keep = {"step": run.trainer.steps, "epoch": run.epoch} if resumed else None
            opened = [stack.enter_context(closing(kind.open(path / "log", keep))) for kind in formats]
            run.trainer.logger = Loggers(opened)
        view.begin(run)
        termination = stack.enter_context(noted())
        looking = _Looking(run, folder, view, termination)
        _train_to_the_end(looking)
        view.on_test()
        results = _results(run, folder, looking)
        if processes.first:
            write_json(folder.results_file, results)
    return results


def _train_to_the_end(looking: _Looking) -> None:
    run, folder, view, termination = looking.run, looking.folder, looking.view, looking.termination
    config, last = run.config, run.batches.steps

    def on_step() -> None:
        if termination.asked_of(run.processes):
            folder.save(run)
            raise TerminatedError(f"ended by SIGTERM after step {run.trainer.steps}, which is saved")
        if run.trainer.steps % config.save_every == 0 and run.batch < last:
            folder.save(run)
        view.on_step()

    while not run.over:
        try:
            record = run.train_epoch(on_step, looking.prepare)
        except RuntimeError as error:
            # A queue's SIGTERM reaches the loader processes too, and torch says so in the middle of whatever runs.
            if termination.asked and "DataLoader worker" in str(error):
                raise TerminatedError("ended by SIGTERM; the last checkpoint is kept") from error
            raise
        if run.finish_epoch(record, looking):
            folder.save_best(run)
        if run.epoch in config.keep_epochs:
            folder.save_epoch(run)
        folder.save(run)
        looking.state = None
        view.on_epoch()


@dataclass
class _Looking:
    """Called between the batches of an evaluation, where a run may be asked to end.

    Attributes:
        run: the run.
        folder: where the run lives.
        view: who watches.
        termination: whether to end.
        state: the run's state before the evaluation; None where it is saved already.
    """

    run: Run
    folder: RunFolder
    view: View
    termination: Termination
    state: dict[str, Any] | None = None

    def prepare(self) -> None:
        """Takes the run's state after the last batch of an epoch; an evaluation changes none of its tensors."""
        self.state = self.run.state_dict()
        self.state["history"] = list(self.run.history)

    def __call__(self, done: int, total: int) -> None:
        self.view.on_evaluation(done, total)
        # Several processes look at different numbers of batches, so that they end together at the next step.
        if self.termination.asked and self.run.processes.world == 1:
            if self.state is not None:
                self.folder.save_state(self.run, self.state)
            raise TerminatedError(f"ended by SIGTERM after step {self.run.trainer.steps}, which is saved")


def _test(run: Run, folder: RunFolder, looking: _Looking) -> dict[str, Accuracy]:
    """Takes the one look at the test set; if the best weights' checkpoint is damaged, a warning says so instead."""
    last = run.evaluate("test", on_batch=looking)
    if run.best is None or run.best.epoch == run.epoch:
        return {"last": last, "best": last}
    try:
        weights = folder.weights("best").weights
    except CheckpointError as error:
        warnings.warn(f"{error}. The results are of the last weights only.", stacklevel=2)
        return {"last": last}
    return {"last": last, "best": run.evaluate("test", run.with_weights(weights), on_batch=looking)}


def _results(run: Run, folder: RunFolder, looking: _Looking) -> dict[str, Any]:
    """Test accuracies of best and last (the one look at the test set), and everything a report needs."""
    config, dataset = run.config, run.dataset
    looks = _test(run, folder, looking) if config.test else {}
    seconds = [row["step_seconds"] for row in run.history]
    return {
        "format": 1,
        "method": label_of(config.optimizer),
        "config": config.as_dict(),
        "alpha": run.alpha,
        "parameters": sum(p.numel() for p in run.net.parameters()),
        "data": {
            "name": dataset.name,
            "identity": run.data,
            "classes": dataset.classes,
            "shape": list(dataset.train.shape),
            "train": len(dataset.train),
            "validation": len(dataset.validation),
            "test": len(dataset.test),
        },
        "epochs": run.epoch,
        "stopped_early": run.epoch < config.epochs,
        "best_epoch": None if run.best is None else run.best.epoch,
        "validation": None if run.best is None else asdict(run.best.accuracy),
        "test": {which: asdict(accuracy) for which, accuracy in looks.items()},
        "overfit": overfit(robust_of(looks["best"]), robust_of(looks["last"])) if "best" in looks else None,
        "seconds": sum(row["seconds"] for row in run.history),
        "step_seconds": median(seconds) if seconds else None,
        "steps": run.trainer.step_report().as_dict(),
        "history": run.history,
        "machine": {**machine_facts(run.processes.device), "processes": run.processes.world},
    }
