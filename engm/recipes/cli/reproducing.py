"""The command that repeats the paper: ``engm reproduce``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..devices import choose_device, only_cpu
from ..machine import set_machine
from ..methods import LABELS
from .errors import explained_failures
from .options import DECIDED, ConfigFile, chosen_settings, go_on, seeds_from, with_settings
from .terminal import OnceCommand, console_for

if TYPE_CHECKING:
    import torch

    from ..reproduce import Analysis, Cell, Request

app = typer.Typer()
ALL = "all"


def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            help="table1 to table5, table3-l2 (its supplement), fig1 to fig5, fig5a to fig5h (one panel), or "
            "all of it: all."
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(help="Folder for runs and results; what is in it is gone on with.")] = Path(
        "runs/reproduce"
    ),
    budget: Annotated[str, typer.Option(help="smoke, small or paper.")] = "small",
    seeds: Annotated[str | None, typer.Option(help="How many, or which: 4,7. Default: the budget's.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Cells at once; default: as many as there is room for.")
    ] = None,
    optimizers: Annotated[str | None, typer.Option(help="Those of Table 2 to compare; default: all seven.")] = None,
    rows: Annotated[
        str | None, typer.Option(help="Rows of tables 2, 3 and 4, as awp-engm or cifar10-mart-msgd; default: all.")
    ] = None,
    plan_only: Annotated[bool, typer.Option("--plan", help="Only say, at once, what it would cost.")] = False,
    config: ConfigFile = None,
    settings: dict[str, Any],
) -> None:
    """Repeats a figure or table of the paper, or all, at a budget: plan, runs, table beside the paper's, picture."""
    from ..reproduce import ANALYSES, Request, analysis, forecast, shared_cells
    from ..reproduce import budget as budget_named
    from ..runs.contents import check_free_for_several

    with explained_failures(go_on):
        check_free_for_several(out)
        chosen = budget_named(budget)
        numbers = list(range(chosen.seeds)) if seeds is None else seeds_from(seeds)
        wanted = list(ANALYSES.values()) if name == ALL else [analysis(name)]
        if optimizers is not None and name not in ("table2", "fig5h"):
            raise ValueError(f"--optimizers is for table2 and fig5h; {name} has its own")
        compared = tuple(LABELS) if optimizers is None else tuple(_names(optimizers))
        request = Request(
            chosen, chosen_settings(settings, config), numbers, compared, () if rows is None else _names(rows)
        )
        found = [(one, one.wanted(request)) for one in wanted]
        first = found[0][1][0].config
        console = console_for()
        title = "Every table and figure" if name == ALL else wanted[0].title
        console.print(f"{title}; budget {chosen.name}: {chosen.purpose}.", highlight=False, soft_wrap=True)
        together = found[0][1] if name != ALL else shared_cells([cells for _, cells in found])
        if plan_only:  # which needs no torch where there can be no GPU
            where = "cpu" if only_cpu(first.device) else str(choose_device(first.device))
            console.print(str(forecast(together, out / "runs", where, jobs)), highlight=False, soft_wrap=True)
            return
        with Console(stderr=True).status("loading torch"):
            device = choose_device(first.device)
            set_machine(first.resolved())
        at_once = _planned(console, together, out, device, jobs) if chosen.planned else jobs or 1
        if name == ALL:
            if not chosen.planned:
                at_once = forecast(together, out / "runs", str(device), jobs).jobs
            _compute(console, together, out, device, at_once)
        for one, cells in found:
            _carry_out(console, one, request, cells, out, device, 1 if name == ALL else at_once)


app.command(cls=OnceCommand)(with_settings(reproduce, leave_out=DECIDED))


def _names(text: str) -> list[str]:
    """The names that a text has between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _planned(console: Console, cells: list[Cell], out: Path, device: torch.device, jobs: int | None) -> int:
    """Times a few steps of each kind of run, says what all will cost, and gives the number of cells at once."""
    from ..reproduce.timing import expense_of
    from ..runs.progress import progress_bar

    with progress_bar(console, transient=True) as bar:
        task = bar.add_task("timing a few steps of each kind of run", total=None)
        on_kind: Callable[[int, int], None] = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        expense = expense_of(cells, out / "runs", device, jobs, on_kind)
    console.print(str(expense), highlight=False, soft_wrap=True)
    return expense.jobs


def _compute(console: Console, cells: list[Cell], out: Path, device: torch.device, jobs: int) -> None:
    """Trains and measures what several analyses need."""
    from ..reproduce import compute
    from ..runs.progress import RunView, progress_bar

    with progress_bar(console) as bar:
        task = bar.add_task("runs of all", total=len(cells))
        compute(
            cells,
            out / "runs",
            device,
            jobs=jobs,
            view=lambda title: RunView(console, f"{title}: "),
            on_cell=lambda record, done: bar.update(task, completed=done),
        )


def _carry_out(
    console: Console, what: Analysis, request: Request, cells: list[Cell], out: Path, device: torch.device, jobs: int
) -> None:
    """Carries one analysis out and prints its tables."""
    from ..reproduce import carry_out
    from ..runs.progress import RunView, progress_bar

    with progress_bar(console) as bar:
        task = bar.add_task("cells", total=len(cells))
        outcome = carry_out(
            what,
            request,
            cells,
            out,
            device,
            jobs=jobs,
            view=lambda title: RunView(console, f"{title}: "),
            on_cell=lambda record, done: bar.update(task, completed=done),
        )
    console.print(outcome.markdown(), highlight=False, soft_wrap=True)
    console.print(f"Table, figures, picture: {out / what.name}", highlight=False)
