"""The loop that trains a run to its end in its folder, from wherever it was left."""

from __future__ import annotations

import time
import warnings
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..accuracy import Accuracy, overfit
from ..config import RunConfig, parse_duration
from ..data import Dataset, check_same_data, identities
from ..failures import CheckpointError
from ..machine import machine_facts
from ..methods import label_of
from ..processes import Processes
from ..storage.atomic_files import write_json
from ..storage.folder_lock import locked
from ..training.building import load_extra, load_in_turn
from ..training.loggers import LogFormat, Loggers
from ..training.run import Run, robust_of
from .files import LAST, RunFolder
from .given_weights import given_for
from .refused import Before
from .termination import Deadline, TerminatedError, Termination, noted
from .view import NoView, View


def train(
    config: RunConfig,
    path: Path,
    processes: Processes,
    *,
    view: View | None = None,
    dataset: Dataset | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Trains a run to its end in a folder, from wherever it was left.

    Args:
        config: settings of the run.
        path: folder of the run; it is made when everything that can be checked before training has been.
        processes: the processes that train it together; they must see the same folder.
        view: who watches.
        dataset: ``None`` to load the one that the configuration names.
        began: when the time limit began to count, by ``time.monotonic``; ``None``: now.

    Returns:
        The results, as ``results.json`` holds them.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: something does not fit; nothing was written.
        RefusedError: the network's norms cannot be told; where nothing was trained, nothing new is left in the folder.
        NonFiniteError: training diverged; the last good checkpoint is kept.
        TerminatedError: SIGTERM came, or the time limit does; the state at that batch is kept.
        CheckpointError: all checkpoints are damaged.
        OSError: the disk is full, say; what was saved before is whole.
    """
    began = time.monotonic() if began is None else began
    folder = RunFolder(path)
    config = folder.check_free_for(config)
    if folder.is_over(config):
        results = folder.results()
        if folder.check_moved(config, lambda: _data(config, processes, dataset)) and processes.first:
            folder.settle(config)
        if dataset is not None and "identity" in results["data"]:
            check_same_data(results["data"]["identity"], identities(dataset), dataset.name)
        return results
    if dataset is None and folder.store.names(LAST):
        folder.check_data_there(config)
    formats = [LogFormat(name) for name in config.loggers]
    for kind in formats:
        kind.check()
    run = Run(config, processes, dataset, given_for(folder, config))
    view = view if view is not None and processes.first else NoView()
    with ExitStack() as stack:
        with processes.together():
            if processes.first:
                before = Before.of(path)
                stack.enter_context(locked(path))
                folder.check_free_for(config)  # once more, since somebody may have begun meanwhile
                stack.enter_context(before.again_if_refused(lambda: bool(folder.store.names(LAST))))
        resumed = folder.restore(run)  # refuses other data and other code, while nothing is changed yet
        with processes.together():
            if processes.first:
                folder.settle(config)
        if processes.first and formats:
            keep = {"step": run.trainer.steps, "epoch": run.epoch} if resumed else None
            opened = [stack.enter_context(closing(kind.open(path / "log", keep))) for kind in formats]
            run.trainer.logger = Loggers(opened)
        view.begin(run)
        termination = stack.enter_context(noted(_deadline(config, began)))
        looking = _Looking(run, folder, view, termination)
        _train_to_the_end(looking)
        view.on_test()
        results = _results(run, folder, looking)
        if processes.first:
            write_json(folder.results_file, results)
    return results


def _data(config: RunConfig, processes: Processes, dataset: Dataset | None) -> Dataset:
    """The data set that a configuration names, with its extra examples."""
    found = load_in_turn(config, processes) if dataset is None else dataset
    return load_extra(config, found, processes.device)


def _deadline(config: RunConfig, began: float) -> Deadline | None:
    if config.time_limit is None:
        return None
    return Deadline(config.time_limit, began + parse_duration(config.time_limit))


def _train_to_the_end(looking: _Looking) -> None:
    run, folder, view, termination = looking.run, looking.folder, looking.view, looking.termination
    config, last = run.config, run.batches.steps

    def on_step() -> None:
        if termination.asked_of(run.processes):
            folder.save(run)
            raise TerminatedError(f"ended by {termination.by} after step {run.trainer.steps}, which is saved")
        if run.trainer.steps % config.save_every == 0 and run.batch < last:
            folder.save(run)
        view.on_step()

    while not run.over:
        try:
            record = run.train_epoch(on_step, looking.prepare)
        except RuntimeError as error:
            # A queue's SIGTERM reaches the loader processes too, and torch says so in the middle of whatever runs.
            if termination.signalled and "DataLoader worker" in str(error):
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
            raise TerminatedError(f"ended by {self.termination.by} after step {self.run.trainer.steps}, which is saved")


def _test(run: Run, folder: RunFolder, looking: _Looking) -> dict[str, Accuracy]:
    """Takes the one look at the test set; if the best weights' checkpoint is damaged, a warning says so instead.

    Where weights are averaged, those that trained are looked at as well.
    """
    looks = {"last": run.evaluate("test", on_batch=looking)}
    if run.evaluated is not run.net:
        looks["last_plain"] = run.evaluate("test", run.net, looking)
    if run.best is None or run.best.epoch == run.epoch:
        return {**looks, **{name.replace("last", "best"): accuracy for name, accuracy in looks.items()}}
    try:
        best = folder.weights("best")
    except CheckpointError as error:
        warnings.warn(f"{error}. The results are of the last weights only.", stacklevel=2)
        return looks
    looks["best"] = run.evaluate("test", run.with_weights(best.weights), looking)
    if best.plain is not None:
        looks["best_plain"] = run.evaluate("test", run.with_weights(best.plain), looking)
    return looks


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
            **({} if dataset.extra is None else {"extra": len(dataset.extra)}),
        },
        **({} if run.initial is None else {"initial": run.initial}),
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
