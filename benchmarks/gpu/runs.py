"""Adversarial training with the trainer of ``engm train``: momentum SGD, A-ENGM and ENGM, an epoch of each in turn.

The number of epochs is planned from the pace of a few steps, so that all methods end within the stage's time with the
paper's schedule compressed to it. The folder of the runs keeps the plan and the checkpoints: another call with the same
folder goes on where the last one stopped.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from engm.recipes.config import PAPER_EPOCHS, RunConfig
from engm.recipes.data import Dataset
from engm.recipes.machine import set_machine
from engm.recipes.processes import Processes
from engm.recipes.runs.folder import RunFolder
from engm.recipes.storage.atomic_files import write_text_atomic
from engm.recipes.training.building import load_dataset
from engm.recipes.training.run import Run

from .record import Absent, Stage
from .timing import Bench

METHODS = ("msgd", "a-engm", "engm")
SAVE_EVERY = 45.0  # seconds between two checkpoints of a run, each of which is 90 megabytes
LOOKS = 8  # at the validation set, in the course of a run
SHARE = 0.85  # of the time that is planned for; the rest is for what the pace does not show
LEAST_EPOCHS = 3


def run(bench: Bench, stage: Stage, arguments: Any) -> None:
    """Trains every seed, one case each, as far as the stage's time reaches."""
    for seed in arguments.seeds:
        stage.case(f"seed {seed}", lambda seed=seed: _seed(bench, stage, arguments, seed), seed=seed)


def configuration(method: str, seed: int, epochs: int, bench: Bench, arguments: Any) -> RunConfig:
    """The settings of one run: the paper's, but for the length, the attack's mode and what ``--tiny`` shrinks."""
    tiny, bf16 = bench.tiny, arguments.training_precision == "bf16"
    return RunConfig(
        data=str(arguments.data),
        validation_examples=8 if tiny else 1000,
        model="resnet18",
        width=4 if tiny else None,
        optimizer=method,
        seed=seed,
        epochs=epochs,
        batch_size=8 if tiny else arguments.batch,
        attack_steps=2 if tiny else 10,
        evaluate_every=max(1, epochs // LOOKS),
        evaluation_steps=2 if tiny else 20,
        precision="bf16" if bf16 else "fp32",
        channels_last=bf16,
        tf32=arguments.training_precision != "fp32",
        device=str(bench.device),
        loggers=(),
        step="auto",
    ).resolved()


def _seed(bench: Bench, stage: Stage, arguments: Any, seed: int) -> dict[str, Any]:
    if arguments.data is None or not Path(arguments.data).exists():
        raise Absent("no --data FILE.npz with x_train, y_train, x_test, y_test")
    first = configuration(METHODS[0], seed, PAPER_EPOCHS, bench, arguments)
    set_machine(first)
    folder, here = arguments.runs / f"seed-{seed}", Processes(bench.device)
    folder.mkdir(parents=True, exist_ok=True)
    dataset = load_dataset(first, bench.device)
    plan = _plan(folder / "plan.json", first, bench, stage, arguments, dataset)
    figures: dict[str, Any] = {"plan": plan, "methods": {}}
    runs, folders = {}, {}
    for name in METHODS:
        runs[name] = Run(configuration(name, seed, plan["epochs"], bench, arguments), here, dataset)
        folders[name] = RunFolder(folder / name)
        folders[name].restore(runs[name])
        figures["methods"][name] = _figures(runs[name])
    _train(stage, f"seed {seed}", runs, folders, figures)
    figures["finished"] = all(run.over for run in runs.values())
    if figures["finished"]:
        for name, run in runs.items():
            figures["methods"][name]["test"] = _test(run, folders[name])
            stage.partly(f"seed {seed}", figures)
    print(f"    seed {seed}: {'finished' if figures['finished'] else 'call again to go on'}", flush=True)
    return figures


# -- the plan ------------------------------------------------------------------------------------------------------


def _plan(
    path: Path, config: RunConfig, bench: Bench, stage: Stage, arguments: Any, dataset: Dataset
) -> dict[str, Any]:
    """The plan that the folder holds already, or a new one.

    Raises:
        ValueError: the folder's plan is of other data or other settings.
    """
    settings = {
        "data": [Path(arguments.data).name, len(dataset.train), len(dataset.test)],
        "precision": arguments.training_precision,
        "batch": config.batch_size,
        "epochs asked for": arguments.epochs,
        "device": bench.device.type,
    }
    if path.exists():
        plan: dict[str, Any] = json.loads(path.read_text())
        if plan["settings"] != settings:
            raise ValueError(f"{path} plans runs with {plan['settings']}, not {settings}: choose another folder")
        return plan
    budget = stage.left
    paces = {name: _pace(name, bench, arguments, config.seed, dataset) for name in METHODS}
    epochs = arguments.epochs or planned_epochs(
        budget=budget,
        paces=list(paces.values()),
        steps=len(dataset.train) // config.batch_size,
        looks=(LOOKS * len(dataset.validation) + 2 * len(dataset.test)) / config.batch_size,
    )
    epochs = 2 if bench.tiny else epochs
    plan = {"epochs": epochs, "seconds a step": paces, "planned for seconds": round(budget, 1), "settings": settings}
    write_text_atomic(path, json.dumps(plan, indent=1) + "\n")
    print(f"    seed {config.seed}: {epochs} epochs planned, seconds a step {paces}", flush=True)
    return plan


def planned_epochs(*, budget: float, paces: list[float], steps: int, looks: float) -> int:
    """How many epochs of every method fit.

    Args:
        budget: seconds of all methods together.
        paces: seconds a step, of each method.
        steps: of an epoch.
        looks: batches that are evaluated in the course of a run; each costs 20 attack steps to a training step's 10
            and the update.
    """
    evaluation = 20 / 11 * looks
    return min(PAPER_EPOCHS, max(LEAST_EPOCHS, int((SHARE * budget / sum(paces) - evaluation) / steps)))


def _pace(name: str, bench: Bench, arguments: Any, seed: int, dataset: Dataset) -> float:
    """Seconds a step of a run that is thrown away, once its step is recorded and calibrated."""
    before, timed = (2, 2) if bench.tiny else (15, 30)
    run = Run(configuration(name, seed, 1, bench, arguments), Processes(bench.device), dataset)
    run.begin_epoch()
    start = 0.0
    for index, (x, y) in enumerate(islice(run.batches.epoch(0, start=0), before + timed)):
        if index == before:
            bench.synchronize()
            start = time.monotonic()
        run.step(x, y)
    bench.synchronize()
    return round((time.monotonic() - start) / timed, 5)


# -- training ------------------------------------------------------------------------------------------------------


def _train(
    stage: Stage, label: str, runs: dict[str, Run], folders: dict[str, RunFolder], figures: dict[str, Any]
) -> None:
    """Trains an epoch at a time, always of the run that is furthest behind, until all are over or the time is."""
    saved = {name: (runs[name].epoch, time.monotonic()) for name in runs}
    longest = 0.0
    try:
        while waiting := [name for name in runs if not runs[name].over]:
            name = min(waiting, key=lambda name: runs[name].epoch)
            run, start = runs[name], time.monotonic()
            if stage.left < 1.3 * longest + 2.0 * len(runs):  # what is not saved yet takes its seconds
                return
            record = run.train_epoch(lambda: None)
            if run.finish_epoch(record):
                folders[name].save_best(run)
            if run.over or time.monotonic() - saved[name][1] > SAVE_EVERY:
                folders[name].save(run)
                saved[name] = run.epoch, time.monotonic()
            longest = max(longest, time.monotonic() - start)
            figures["methods"][name] = _figures(run)
            stage.partly(label, figures)
    finally:
        for name, run in runs.items():
            if run.epoch != saved[name][0] and run.batch == 0:
                folders[name].save(run)


def _figures(run: Run) -> dict[str, Any]:
    """What a run has come to so far."""
    return {
        "epochs": run.epoch,
        "of": run.config.epochs,
        "alpha": run.alpha,
        "steps": run.trainer.step_report().as_dict(),
        "best": None if run.best is None else {"epoch": run.best.epoch, **asdict(run.best.accuracy)},
        "history": [{k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in run.history],
    }


def _test(run: Run, folder: RunFolder) -> dict[str, Any]:
    """Accuracy of the last and the best weights on the test set; a later call finds it in the folder."""
    path = folder.path / "test.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    last = run.evaluate("test")
    best = last
    if run.best is not None and run.best.epoch != run.epoch:
        best = run.evaluate("test", run.with_weights(folder.weights("best").weights))
    if run.processes.device.type == "cuda":
        torch.cuda.empty_cache()
    found = {"last": asdict(last), "best": asdict(best)}
    write_text_atomic(path, json.dumps(found) + "\n")
    return found
