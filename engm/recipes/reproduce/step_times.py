"""Table 1: the time of a training step with every optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from math import inf
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, ClassVar

from ..machine import machine_facts, set_machine
from ..methods import LABELS
from ..pictures import style_of
from ..storage.atomic_files import make_folder, read_json, write_json
from .analysis import Analysis, Request
from .cells import Cell, dataset_of
from .outcome import Outcome, Table
from .published import TABLE1_SECONDS
from .statistics import Record, selected

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from ..runs.view import View
    from ..training.run import Run

BORROWED, OWN = "borrowed", "own pass"
READ_NORMS = ("f-engm", "n-engm", "a-engm", "engm")
WARM_UP = 2  # the first calibration is in it; A-ENGM's first regression too


@dataclass(frozen=True)
class StepTimeCell(Cell):
    """Every optimizer in turn on the same batches; its configuration is the one that all share.

    Attributes:
        steps: number of steps of every optimizer that are timed.
    """

    steps: int = 20
    alone: ClassVar[bool] = True

    @property
    def folder_name(self) -> str:
        """The name of the folder that holds the times."""
        return f"times-{self.steps}-{super().folder_name}"

    def run(
        self,
        runs: Path,
        device: torch.device,
        view: Callable[[], AbstractContextManager[View | None]] = nullcontext,
    ) -> Record:
        """Times the steps, or reads the times that were taken before on the same machine."""
        set_machine(self.config.resolved())
        path = runs / self.folder_name / "times.json"
        known: Record = read_json(path) if path.is_file() else {}
        if known.get("machine") == machine_facts(device):  # times of another machine say nothing here
            return known
        record = {
            "name": self.name,
            "labels": self.labels,
            "folder": self.folder_name,
            "config": {k: v for k, v in self.config.resolved().as_dict().items() if k not in ("data", "data_root")},
            "machine": machine_facts(device),
            "seconds_per_step": self._times(device),
        }
        make_folder(path.parent)
        write_json(path, record)
        return record

    def is_trained(self, runs: Path) -> bool:
        """Whether the steps were timed."""
        return (runs / self.folder_name / "times.json").is_file()

    def _times(self, device: torch.device) -> dict[str, list[float]]:
        """Seconds of every step by contender, all of which take turns on the same batches."""
        from ..processes import Processes
        from ..training.run import Run
        from ..training.turns import take_turns

        dataset = dataset_of(self.config.resolved(), device)
        step = "eager" if self.config.step == "auto" else self.config.step  # the paper's steps were not recorded
        shared = replace(self.config, step=step)
        contenders = {
            (name, way): Run(replace(shared, optimizer=name, borrow=way == BORROWED), Processes(device), dataset)
            for name in LABELS
            for way in ((BORROWED, OWN) if name in READ_NORMS else (OWN,))
        }
        for run in contenders.values():
            run.trainer.model.train()
            run.trainer.model.calibration.most_error = inf  # both ways are timed, whatever borrowed norms are judged
        batches = islice(_endless(next(iter(contenders.values()))), WARM_UP + self.steps)
        for _ in take_turns([run.trainer for run in contenders.values()], batches):
            pass
        return {
            f"{name}, {way}": run.trainer.finish_epoch().step_seconds[WARM_UP:]
            for (name, way), run in contenders.items()
        }


def _endless(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        yield from run.batches.epoch(epoch)
        epoch += 1


def time_cells(request: Request) -> list[Cell]:
    """The one cell of the table; a second one at the same time would only compete with it."""
    template = request.cell({}, optimizer="engm", seed=0)
    return [StepTimeCell("step times", {"seed": 0}, template.config, (), request.budget.timed_steps)]


def ratios(record: Record, contender: str) -> list[float]:
    """A contender's time over MSGD's, batch by batch."""
    seconds = record["seconds_per_step"]
    return [a / b for a, b in zip(seconds[contender], seconds[f"msgd, {OWN}"], strict=True)]


def paper_ratio(name: str) -> float | None:
    """An optimizer's time over MSGD's in the paper's Table 1; None for one that the paper does not have."""
    seconds = TABLE1_SECONDS.get(name)
    return None if seconds is None else seconds / TABLE1_SECONDS["msgd"]


def summarise_times(records: Sequence[Record]) -> Outcome:
    """The outcome of Table 1."""
    (record,) = selected(records, {})
    config = record["config"]
    lines = []
    for contender, seconds in record["seconds_per_step"].items():
        name, _ = contender.split(", ")
        paper = paper_ratio(name)
        middle = median(ratios(record, contender))
        published = "" if paper is None else f"{paper:.2f}"
        lines.append([_label(contender), f"{1000 * median(seconds):.0f}", f"{middle:.2f}", published])
    table = Table(
        f"A training step of {config['model']}, {config['attack_steps']} attack steps, batches of "
        f"{config['batch_size']}: median of {len(seconds)} steps, optimizers in turn on the same batches; ratio: the "
        "median of the ratios batch by batch. Calibrations and A-ENGM's regressions happen every "
        f"{config['calibrate_every']} and {config['tau']} steps; a median leaves them out unless that is often, the "
        "paper's ratios include them. The paper's ENGM and F-ENGM run one backpropagation an example.",
        ["optimizer", "ms", "ratio to MSGD", "the paper's ratio (Titan RTX)"],
        lines,
    )
    rows = [
        {"contender": contender, "step": k, "seconds": value}
        for contender, seconds in record["seconds_per_step"].items()
        for k, value in enumerate(seconds)
    ]
    return Outcome([table], [], rows, lambda drawn: _draw(record, drawn), (9, 4.5))


def _label(contender: str) -> str:
    """An optimizer's label, and where its norms come from if it reads any."""
    name, way = contender.split(", ")
    return f"{LABELS[name]}, {way}" if name in READ_NORMS else LABELS[name]


def _draw(record: Record, drawn: Figure) -> None:
    """Draws the ratios as bars, and beside them at the same scale the paper's."""
    from matplotlib.ticker import LogLocator, NullLocator  # imported here, because commands start faster without it

    ours, paper = drawn.subplots(1, 2, sharex=True, sharey=True)
    contenders = list(record["seconds_per_step"])
    for index, contender in enumerate(contenders):
        name, way = contender.split(", ")
        look = {"color": style_of(name).colour, "hatch": "" if way == OWN else "//", "edgecolor": "white"}
        ours.barh(index, median(ratios(record, contender)), **look)
        published = paper_ratio(name)
        if published is not None and way == OWN:  # the paper borrows no norms
            paper.barh(index, published, **look)
    ours.set_yticks(range(len(contenders)), [_label(contender) for contender in contenders])
    ours.set(title="these runs", ylim=(len(contenders) - 0.5, -0.5), xscale="log")
    ours.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0,)))
    ours.xaxis.set_major_formatter("{x:g}")
    ours.xaxis.set_minor_locator(NullLocator())
    paper.set(title="the paper, Titan RTX")
    for axis in (ours, paper):
        axis.set_xlabel("time of a step, ratio to MSGD's")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.grid(visible=False, axis="y")


TABLE_1 = Analysis("table1", "Time of a training step (Table 1)", time_cells, summarise_times)
