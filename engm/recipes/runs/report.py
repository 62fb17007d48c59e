"""Tables of run folders: one row a run, or one a setting with mean and deviation over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..config import RunConfig
from ..evaluation.asking import known_answer
from ..spelling import shown_radius
from ..storage.atomic_files import read_object
from ..storage.checkpoint import CheckpointError
from ..storage.weights_files import digest_of
from .contents import described, runs_of
from .files import RunFolder

# Settings that make a row; its label names those in which rows differ, the optimizer's own where rows of one method do.
ROW_SETTINGS = [f.name for f in fields(RunConfig) if f.metadata["outcome"] and f.name not in ("seed", "optimizer")]
# Settings that usually follow from another one; the label of a row does not name them where they do.
FOLLOW = {
    "decay_epochs": "epochs",
    "schedule_epochs": "epochs",
    "step_size": "eps",
    "attack_mode": "objective",
    "guide": "objective",
    "awp_warmup": "awp",
}
METHOD_SETTINGS = ("alpha", "clip_fraction", "tau", "beta_gamma", "max_norm", "borrow", "batch_norm", "calibrate_every")


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone.

    Attributes:
        label: what these runs have in common and others have not.
        results: results of every run.
    """

    label: str
    results: list[dict[str, Any]]

    def values(self, *path: str) -> list[float]:
        """The values of one figure, of the runs that have it."""
        found = []
        for result in self.results:
            value: Any = result
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                found.append(float(value))
        return found


COLUMNS: dict[str, tuple[tuple[str, ...], str]] = {
    "Natural": (("test", "best", "natural"), "%"),
    "Best": (("test", "best", "robust"), "%"),
    "Last": (("test", "last", "robust"), "%"),
    "Overfit": (("overfit",), "%"),
    "AA": (("autoattack",), "%"),
    "Best epoch": (("best_epoch",), "f"),
    "s/step": (("step_seconds",), "s"),
}
"""The paper's Table 2 with times: heading, where the figure lies in a result, its unit."""
PLAIN_COLUMNS: dict[str, tuple[tuple[str, ...], str]] = {
    "Best, plain": (("test", "best_plain", "robust"), "%"),
    "Last, plain": (("test", "last_plain", "robust"), "%"),
}
"""The same of the weights that trained, in tables of runs that average them."""


def collect(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], list[Path]]:
    """The results of run folders, of an analysis's runs, and of the finished ones below any other folder.

    Analyses of ``engm reproduce`` train the same run twice where one of them keeps weights that the other does not;
    of two such runs that came to the same, the first one is taken.

    Returns:
        The results, each with its ``folder`` and the ``autoattack`` accuracy of the best checkpoint where all test
        images were attacked at the run's own radius; and the runs below a path that are not finished.

    Raises:
        FileNotFoundError: a path is no run folder and has none below it, or a run that was named is not over.
    """
    found: dict[Path, dict[str, Any]] = {}
    unfinished = []
    for path in paths:
        runs = runs_of(path)
        computed: dict[str, Any] = {}
        if not runs:
            raise FileNotFoundError(f"{path} is no run folder, and there is none in it: the path {described(path)}")
        for folder in runs:
            if folder != path and not RunFolder(folder).results_file.is_file():
                unfinished.append(folder)
                continue
            result = RunFolder(folder).results()
            # Runs of an earlier version say nothing of settings that there were not.
            result["config"] = {**RunConfig().as_dict(), **result["config"]}
            kept = result["config"].get("keep_epochs")
            if computed.setdefault(_computed(result), kept) != kept:
                continue
            more = {"folder": str(folder), "autoattack": _autoattack(RunFolder(folder), result)}
            found[folder.resolve()] = {**result, **more}
    return list(found.values()), unfinished


def _computed(result: Mapping[str, Any]) -> str:
    """What a run computed and came to: the same text for runs that differ in what they wrote down alone."""
    settings = [result["config"].get(name) for name in ("optimizer", "seed", *ROW_SETTINGS)]
    return repr([_processes(result), settings, result["test"]])


def _autoattack(folder: RunFolder, result: Mapping[str, Any]) -> float | None:
    known = read_object(folder.evaluations_file) if folder.evaluations_file.is_file() else {}
    wanted = {"examples": result["data"]["test"], "eps": result["config"]["eps"], "epoch": result["best_epoch"]}
    if "identity" in result["data"]:
        wanted["data"] = result["data"]["identity"]["test"]
    if known:
        with suppress(FileNotFoundError, CheckpointError):  # as of a run whose checkpoints were thrown away
            wanted["weights"] = digest_of(folder.weights("best").weights)  # it may have been trained anew since
    threat = result["config"]["threat"]
    found = known_answer(known.get("best", {}).get("autoattack", []), {**wanted, "threat": threat}, threat)
    return None if found is None else found["accuracy"]


def rows_of(results: Sequence[dict[str, Any]]) -> list[Row]:
    """Results grouped by everything but the seed that can change a result, labelled by what the groups differ in.

    Raises:
        ValueError: two runs of one row have the same seed; names their folders.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        # With batch norm the number of processes is part of what is computed.
        key = repr([_processes(result), *(result["config"].get(name) for name in ("optimizer", *ROW_SETTINGS))])
        groups.setdefault(key, []).append(result)
    firsts = [group[0] for group in groups.values()]
    rows = []
    for group in groups.values():
        method, config = group[0]["method"], group[0]["config"]
        _check_seeds(group)
        shown: list[str] = []
        for name in ROW_SETTINGS:
            peers = [r for r in firsts if r["method"] == method or name not in METHOD_SETTINGS]
            leader = FOLLOW.get(name, "")
            led = {repr(r["config"].get(leader)) for r in peers}
            both = {repr((r["config"].get(leader), r["config"].get(name))) for r in peers}
            if len(both) > len(led):
                shown.append(f"{name} {_shown(name, config.get(name))}")
        if len({_processes(r) for r in firsts}) > 1:
            shown.append(f"processes {_processes(group[0])}")
        rows.append(Row(", ".join([method, *shown]), group))
    return rows


def _shown(name: str, value: Any) -> Any:
    return shown_radius(value) if name in ("eps", "step_size") and isinstance(value, float) else value


def _check_seeds(group: Sequence[Mapping[str, Any]]) -> None:
    """Refuses two runs of one row with the same seed, by the names of their folders."""
    by_seed: dict[int, list[str]] = {}
    for result in group:
        by_seed.setdefault(result["config"]["seed"], []).append(str(result.get("folder", "a run")))
    for seed, folders in by_seed.items():
        if len(folders) > 1:
            raise ValueError(
                f"{' and '.join(folders)} are runs of {group[0]['method']} with the same settings and the same seed "
                f"{seed}; leave all but one of them out"
            )


def _processes(result: Mapping[str, Any]) -> int:
    return int(result["machine"]["processes"])


def _cell(values: Sequence[float], unit: str, runs: int) -> str:
    """Mean and deviation; behind them of how many runs, if not of all."""
    if not values:
        return "-"
    scale, digits = (100, 1) if unit == "%" else (1, 3 if unit == "s" else 0)
    scaled = [scale * value for value in values]
    text = f"{mean(scaled):.{digits}f}"
    text = text if len(scaled) < 2 else f"{text} ± {stdev(scaled):.{digits}f}"
    return text if len(scaled) == runs else f"{text} (of {len(scaled)})"


def cells(row: Row, columns: Mapping[str, tuple[tuple[str, ...], str]] = COLUMNS) -> list[str]:
    """A row of the table: mean, and deviation where there are several seeds. Accuracies in per cent."""
    figures = [_cell(row.values(*path), unit, len(row.results)) for path, unit in columns.values()]
    return [row.label, str(len(row.results)), *figures]


def _averaged(results: Sequence[dict[str, Any]]) -> bool:
    """Whether a run has averaged weights, and figures of those that trained beside theirs."""
    return any("last_plain" in result["test"] for result in results)


HEADINGS = ("Run", "Seeds", *COLUMNS)


def grid(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table; with the columns of plain weights where a run has averaged ones."""
    plain = PLAIN_COLUMNS if _averaged(results) else {}
    return [*HEADINGS, *plain], [cells(row, {**COLUMNS, **plain}) for row in rows_of(results)]


def table(results: Sequence[dict[str, Any]]) -> Table:
    """The table for a terminal."""
    drawn = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    headings, rows = grid(results)
    for index, name in enumerate(headings):
        # Labels wrap, figures never do.
        drawn.add_column(name, justify="right" if index else "left", no_wrap=index > 0, min_width=0 if index else 20)
    for row in rows:
        drawn.add_row(*row)
    return drawn


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The same table in Markdown, with what its figures are."""
    headings, rows = grid(results)
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", caption(results)]) + "\n"


def caption(results: Sequence[dict[str, Any]]) -> str:
    """How to read the table."""
    tests = sorted({result["data"]["test"] for result in results})
    steps = sorted({result["config"].get("evaluation_steps", 20) for result in results})
    return (
        f"Per cent of {' or '.join(map(str, tests))} test images. Natural and Best: the checkpoint that was best on "
        f"the validation set; Last: the last one; robust accuracies under PGD-{'/'.join(map(str, steps))} on the "
        "margin loss; AA: AutoAttack on all of them, by engm evaluate. Overfit: (best - last) / best. Means ± standard "
        "deviation over seeds."
        + (" Plain: the weights that trained; the others are their average." if _averaged(results) else "")
    )
