"""What an analysis is: the cells that it needs, and what to make of their records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engm.checks import check_name

from ..config import RunConfig, option
from ..methods import LABELS, canonical_method, check_methods
from ..setups import SETUPS
from .budgets import Budget
from .cells import Cell
from .measures import Gradients, Measure
from .outcome import Outcome
from .statistics import Record


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        budget: scale of the analysis.
        settings: settings of the runs, which go before the budget's and the analysis's.
        seeds: seeds of the runs.
        optimizers: names of the optimizers of Table 2.
        rows: names of the rows that are wanted, of analyses whose cells are rows of a table; none for all.

    Raises:
        ValueError: an optimizer that is unknown or named twice.
    """

    budget: Budget
    settings: dict[str, Any]
    seeds: Sequence[int]
    optimizers: Sequence[str] = tuple(LABELS)
    rows: Sequence[str] = ()

    def __post_init__(self) -> None:
        names = tuple(canonical_method(name) for name in self.optimizers)
        check_methods(names)
        object.__setattr__(self, "optimizers", names)

    @property
    def data(self) -> tuple[str, ...]:
        """The data sets, for analyses that look at several."""
        return (self.settings["data"],) if "data" in self.settings else self.budget.data

    @property
    def first_data(self) -> str:
        """The data set of the analyses that look at one."""
        return self.data[0]

    @property
    def long_length(self) -> dict[str, Any]:
        """The number of epochs of Tables 3 and 4, as a setting; none where it is that of the other runs."""
        long = self.budget.long_epochs
        return {} if long is None else {"epochs": long}

    def setup(self, name: str, *, own_length: bool = False) -> dict[str, Any]:
        """What the authors of a method published, as defaults for :meth:`cell`.

        Args:
            name: one of :data:`~engm.recipes.setups.SETUPS`.
            own_length: take their number of epochs, too, where the budget has the paper's and the user names none.
        """
        known = SETUPS[name]
        length = self.long_length
        if own_length and length and not {"epochs", "decay_epochs"} & self.settings.keys():
            length = {**length, **known.own_length()}
        epochs = self.settings.get("epochs") or length.get("epochs") or self.budget.config({}).epochs
        return {**length, **known.settings(epochs)}

    def cell(
        self,
        labels: dict[str, Any],
        *,
        optimizer: str,
        seed: int,
        measures: Callable[[RunConfig], Sequence[Measure]] = lambda config: (),
        keep: bool = False,
        defaults: Mapping[str, Any] | None = None,
        **axes: Any,
    ) -> Cell:
        """A run with the optimizer's threshold.

        Args:
            labels: labels of the :class:`Cell`; optimizer and seed are put to them.
            optimizer: name of the optimizer.
            seed: seed of the run.
            measures: what is measured, given the run's resolved configuration.
            keep: whether the measures look at weights in the course of training.
            defaults: settings of the analysis that the user's go before.
            axes: settings that the analysis varies.

        Raises:
            ValueError: the user chose one of these.
        """
        user = {name: value for name, value in self.settings.items() if name != "data"}
        for taken in axes.keys() & user.keys():
            raise ValueError(f"{option(taken)} is what this analysis varies, so it cannot be chosen")
        axes.setdefault("data", self.first_data)
        config = self.budget.config({**(defaults or {}), **user}, optimizer=optimizer, seed=seed, **axes)
        if "alpha" not in axes:
            config = replace(config, alpha=self.budget.threshold(optimizer, config))
        self._check(config, keep)
        if keep or self.budget.keep_always:
            config = replace(config, keep_epochs=self.budget.kept_epochs(config))
        shown = {name: value for name, value in labels.items() if name not in ("data", "optimizer")}
        told = [f"{key} {_short(value)}" for key, value in shown.items()]
        name = ", ".join([data_name(config.data), optimizer, *told, f"seed {seed}"])
        every = {**labels, "optimizer": optimizer, "seed": seed}
        return Cell(name, every, config, tuple(measures(config.resolved())))

    def _check(self, config: RunConfig, keep: bool) -> None:
        """Looks for faults that would only come out when everything is trained.

        Raises:
            ValueError: a setting that the analysis's measures cannot do with.
        """
        if not keep:
            return
        if config.early_stop:
            raise ValueError("--early-stop: this analysis looks at weights of epochs that might never come")
        if config.train_examples is not None and config.train_examples < 2 * self.budget.batch:
            raise ValueError(
                f"--train-examples {config.train_examples}: this analysis measures gradients on {self.budget.batch} "
                "images at a time, and needs two such batches"
            )

    def gradients(self, config: RunConfig) -> tuple[Gradients]:
        """The measure of Fig. 2 and Table 5."""
        return (Gradients(self.budget.looked_at, self.budget.batch, self.budget.kept_epochs(config)),)


def data_name(data: str) -> str:
    """A data set's name without its folder and ending."""
    return Path(data).stem


def _short(value: Any) -> str:
    """The value of a label, as the name of a cell has it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Analysis:
    """A figure or table of the paper.

    Attributes:
        name: as the command takes it.
        title: what it shows.
        cells: what has to be computed.
        summarise: tables, findings and picture of the records.
        row_of: the name of the row of the paper's table that a cell is a run of; ``None`` where cells are no rows.
    """

    name: str
    title: str
    cells: Callable[[Request], list[Cell]]
    summarise: Callable[[Sequence[Record]], Outcome]
    row_of: Callable[[Mapping[str, Any]], str] | None = None

    def wanted(self, request: Request) -> list[Cell]:
        """The cells of the rows that are asked for.

        Raises:
            ValueError: the analysis has no rows, or none of such a name; the message says which is nearest.
        """
        cells = self.cells(request)
        if not request.rows:
            return cells
        if self.row_of is None:
            raise ValueError(f"--rows is for tables 2, 3 and 4, whose rows are runs; {self.name} has none")
        names = [self.row_of(cell.labels) for cell in cells]
        for row in request.rows:
            check_name(row, tuple(dict.fromkeys(names)), what=f"row of {self.name} (--rows)")
        return [cell for cell, name in zip(cells, names, strict=True) if name in request.rows]
