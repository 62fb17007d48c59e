"""What a comparison came to: a summary of every method, as a table, a JSON file and a picture of the curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..accuracy import overfit
from ..machine import machine_facts
from ..pictures import legend_below, mark_decays, mean_curve, picture, style_of
from ..training.trainer import EpochRecord
from .side_by_side import Demo, MethodRun

WHOLE_GRADIENT = " w is an example's own weight: MGNC and SNGM scale the mean gradient instead, and leave w at 1."


@dataclass(frozen=True)
class Summary:
    """One row of the paper's Table 2, with times. Accuracies are fractions of the test set.

    Attributes:
        natural: natural accuracy of the best checkpoint (chosen on the validation set).
        natural_last: natural accuracy of the last checkpoint.
        best: PGD-20 robust accuracy of the best checkpoint.
        last: PGD-20 robust accuracy of the last checkpoint.
        overfit: (best - last) / best.
        best_epoch: epochs behind the best checkpoint.
        step_seconds: median seconds of a training step.
        time_ratio: median over the batches of this method's time over MSGD's on the same batch; ``None`` without MSGD.
        total_time_ratio: all steps together, so with the rare expensive ones (calibration, regression).
        mean_weight: mean ``w_i`` over the whole run.
        fraction_clipped: share of examples with ``w_i < 1`` over the whole run.
    """

    method: str
    label: str
    natural: float
    natural_last: float
    best: float
    last: float
    overfit: float
    best_epoch: int
    step_seconds: float
    time_ratio: float | None
    total_time_ratio: float | None
    mean_weight: float
    fraction_clipped: float


def summarise(runs: Sequence[MethodRun]) -> list[Summary]:
    """Summaries of finished runs, in their order.

    Raises:
        RuntimeError: a run has no test accuracy yet.
    """
    seconds = {run.name: [s for record in run.epochs for s in record.step_seconds] for run in runs}
    baseline = seconds.get("msgd")
    rows = []
    for run in runs:
        if run.test_best is None or run.test_last is None:
            raise RuntimeError(f"{run.label} has not been tested yet; summarise after the run is over")
        best, last = run.test_best.robust or 0.0, run.test_last.robust or 0.0
        own = seconds[run.name]
        rows.append(
            Summary(
                method=run.name,
                label=run.label,
                natural=run.test_best.natural,
                natural_last=run.test_last.natural,
                best=best,
                last=last,
                overfit=overfit(best, last),
                best_epoch=run.best.epoch,
                step_seconds=median(own),
                time_ratio=None if baseline is None else median(a / b for a, b in zip(own, baseline, strict=True)),
                total_time_ratio=None if baseline is None else sum(own) / sum(baseline),
                mean_weight=mean_over_epochs(run.epochs, "mean_weight"),
                fraction_clipped=mean_over_epochs(run.epochs, "fraction_clipped"),
            )
        )
    return rows


def mean_over_epochs(records: Sequence[EpochRecord], name: str) -> float:
    """Mean of one figure over the epochs of a run (epochs are equally long)."""
    return fmean(getattr(record, name) for record in records)


def table(demo: Demo) -> Table:
    """The summaries for a terminal, percentages as in the paper."""
    rows = summarise(demo.runs)
    result = Table(
        title=f"{demo.dataset.name}, PGD-{demo.settings.attack_steps} training, l-inf {demo.settings.eps:g}",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    result.add_column("Method", no_wrap=True)
    for name in ("Natural", "Best", "Last", "Overfit", "s/step", "x MSGD", "in all", "mean w", "w < 1"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(
            row.label,
            f"{row.natural:.1%}",
            f"{row.best:.1%}",
            f"{row.last:.1%}",
            f"{row.overfit:.1%}",
            f"{row.step_seconds:.3f}",
            "-" if row.time_ratio is None else f"{row.time_ratio:.2f}",
            "-" if row.total_time_ratio is None else f"{row.total_time_ratio:.2f}",
            f"{row.mean_weight:.2f}" if row.mean_weight < 1000 else f"{row.mean_weight:.0e}",
            f"{row.fraction_clipped:.0%}",
        )
    return result


def caption(demo: Demo) -> str:
    """How to read the table, the uncertainty included."""
    examples = len(demo.dataset.test)
    typical = max((row.best for row in summarise(demo.runs)), default=0.5)
    error = sqrt(typical * (1 - typical) / examples)
    return (
        f"Test set of {examples} examples, looked at once. Best and Last: accuracy under PGD-20 of the checkpoint that "
        "was best on the validation set, and of the last; Natural: of the best. One standard error of these is "
        f"{error:.1%}, and this is one seed: a few points of difference say nothing. x MSGD: median over the batches; "
        "in all: total training time."
        + (WHOLE_GRADIENT if any(run.name in ("mgnc", "sngm") for run in demo.runs) else "")
    )


def write_json(demo: Demo, path: Path, *, seconds: float) -> None:
    """Every figure of the run, with the settings and the machine.

    Args:
        demo: a finished demonstration.
        path: file to write.
        seconds: wall-clock time of the whole run.
    """
    dataset = demo.dataset
    content: dict[str, Any] = {
        "settings": {**asdict(demo.settings), "alpha": demo.alpha},
        "parameters": demo.parameters,
        "data": {
            "name": dataset.name,
            "train": len(dataset.train),
            "validation": len(dataset.validation),
            "test": len(dataset.test),
        },
        "machine": machine_facts(dataset.train.labels.device),
        "seconds": seconds,
        "summaries": [asdict(row) for row in summarise(demo.runs)],
        "runs": {
            run.name: {
                "epochs": [asdict(record) for record in run.epochs],
                "validation": {str(epoch): asdict(accuracy) for epoch, accuracy in run.validation.items()},
            }
            for run in demo.runs
        },
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def draw_curves(demo: Demo, path: Path) -> None:
    """Draws learning curves of all methods: robust accuracy, training loss, mean weight.

    Args:
        demo: a finished demonstration.
        path: as :func:`engm.recipes.pictures.picture` takes it.
    """
    with picture(path, (10.5, 3.6)) as figure:
        robust, loss, weight = axes = figure.subplots(1, 3)
        for run in demo.runs:
            style = style_of(run.name)
            looks = {epoch: 100 * (accuracy.robust or 0.0) for epoch, accuracy in run.validation.items()}
            mean_curve(robust, [looks], style, run.label)
            robust.plot(run.best.epoch, 100 * run.best.score, style.marker, color=style.colour, markersize=6)
            mean_curve(loss, [{k: record.loss for k, record in enumerate(run.epochs, 1)}], style, None)
            mean_curve(weight, [{k: record.mean_weight for k, record in enumerate(run.epochs, 1)}], style, None)
        for panel in axes:
            panel.set_xlabel("epoch")
            mark_decays(panel, demo.settings.training.decay_epochs)
        robust.set_ylabel("PGD-20 accuracy, validation, %")
        loss.set_ylabel("adversarial training loss, nats")
        weight.set_ylabel("mean weight of examples")
        loss.set_ylim(bottom=0)
        if all(record.mean_weight <= 1 for run in demo.runs for record in run.epochs):
            weight.set_ylim(0, 1.05)
        else:  # F-ENGM lengthens short gradients, without bound
            weight.set_yscale("log")
        figure.suptitle(
            f"{demo.dataset.name}: PGD-{demo.settings.attack_steps} training, l-inf {demo.settings.eps:g}, alpha "
            f"{demo.alpha:.2f}, seed {demo.settings.training.seed} (marked: the best epoch)",
            fontsize="medium",
        )
        legend_below(figure)
