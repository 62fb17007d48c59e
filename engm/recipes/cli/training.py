"""The commands that train: ``engm train``, ``compare``, ``reproduce`` and ``demo``."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ..machine import set_machine
from ..methods import LABELS
from ..processes import choose_device, from_environment
from ..training.loggers import LogFormat
from .errors import explained_failures
from .options import DECIDED, chosen_settings, config_from, with_settings
from .terminal import OnceCommand, console_for

app = typer.Typer()
GO_ON = "the same command goes on where it was left"
Out = Annotated[Path, typer.Option(help="Folder of the run; one that exists is gone on with.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE.toml", help="Settings; options given here override them.")
]


def train(*, out: Out, config: ConfigFile = None, settings: dict[str, Any]) -> None:
    """Trains a robust network; the same command with the same --out goes on where it was left.

    Under torchrun, every process takes its share of each batch: torchrun --nproc-per-node 2 -m engm.recipes train ...
    """
    from ..runs.curves import draw
    from ..runs.folder import RunFolder
    from ..runs.folder import train as train_in
    from ..runs.opening import opening_line
    from ..runs.progress import RunView
    from ..runs.report import caption, table

    with explained_failures(f"the same command, or engm train --out {out}, goes on where it was left"):
        folder = RunFolder(out)
        if not folder.exists and config is None and not settings:
            raise ValueError(f"there is no run in {out} to go on with; to begin one, say at least --data")
        chosen = config_from(settings, config if config or not folder.exists else folder.config_file)
        with from_environment(chosen.device) as processes:
            set_machine(chosen)
            console = console_for(quiet=not processes.first)
            chosen = folder.check_free_for(chosen)
            finished = folder.is_over(chosen)
            console.print(opening_line(folder, chosen), highlight=False, soft_wrap=True)
            with RunView(console) as view:
                results = train_in(chosen, out, processes, view=view)
            if finished:
                console.print(f"The run in {out} was finished before; nothing was done.", highlight=False)
            console.print(table([results]), caption([results]), sep="\n", highlight=False)
            if processes.first and not (finished and (out / "curves.png").is_file()):
                with console.status("drawing the curves"):
                    draw([results], out / "curves")
                console.print(f"Everything is in {out}; curves: {out / 'curves.png'}, .svg, .pdf", highlight=False)


app.command(cls=OnceCommand)(with_settings(train))


def compare(
    *,
    out: Out,
    optimizers: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(LABELS),
    seeds: Annotated[str, typer.Option(help="How many (3 is 0,1,2), or which: 4,7 or 4, alone.")] = "3",
    config: ConfigFile = None,
    settings: dict[str, Any],
) -> None:
    """Trains with several optimizers and seeds, everything else alike, and makes one table; finished runs are kept."""
    from ..runs.compare import compare as compare_in
    from ..runs.contents import check_free_for_several
    from ..runs.progress import RunView
    from ..runs.report import caption, table

    with explained_failures(GO_ON):
        check_free_for_several(out)
        chosen = config_from(settings, config, compared=True)
        with from_environment(chosen.device) as processes:
            set_machine(chosen)
            console = console_for(quiet=not processes.first)
            results = compare_in(
                chosen,
                [name for name in optimizers.split(",") if name.strip()],
                _seeds(seeds),
                out,
                processes,
                view=lambda name: RunView(console, f"{name}: "),
            )
            console.print(table(results), caption(results), sep="\n", highlight=False)
            console.print(f"Table, figures and curves: {out}/comparison.md, .json, .png, .svg, .pdf", highlight=False)


app.command(cls=OnceCommand)(with_settings(compare, leave_out=("optimizer", "seed")))


def reproduce(
    name: Annotated[str, typer.Argument(help="table1 to table5, fig2 to fig5; fig5a to fig5h: one panel.")],
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
    plan_only: Annotated[bool, typer.Option("--plan", help="Only say what it would cost.")] = False,
    config: ConfigFile = None,
    settings: dict[str, Any],
) -> None:
    """Repeats a figure or table of the paper, at a budget: plan, runs, table beside the paper's, picture."""
    from ..reproduce import Request, analysis, carry_out, expense_of
    from ..reproduce import budget as budget_named
    from ..runs.contents import check_free_for_several
    from ..runs.progress import RunView, progress_bar

    with explained_failures(GO_ON):
        check_free_for_several(out)
        chosen = budget_named(budget)
        numbers = list(range(chosen.seeds)) if seeds is None else _seeds(seeds)
        what = analysis(name)
        if optimizers is not None and name not in ("table2", "fig5h"):
            raise ValueError(f"--optimizers is for table2 and fig5h; {name} has its own")
        compared = tuple(LABELS) if optimizers is None else tuple(o for o in optimizers.split(",") if o.strip())
        request = Request(chosen, chosen_settings(settings, config), numbers, compared)
        cells = what.cells(request)
        device = choose_device(cells[0].config.device)
        set_machine(cells[0].config.resolved())
        console = console_for()
        console.print(f"{what.title}; budget {chosen.name}: {chosen.purpose}.", highlight=False, soft_wrap=True)
        at_once = jobs or 1
        if chosen.planned or plan_only:
            with progress_bar(console, transient=True) as bar:
                task = bar.add_task("timing a few steps of each kind of run", total=None)
                expense = expense_of(
                    cells, out / "runs", device, jobs, lambda done, total: bar.update(task, completed=done, total=total)
                )
            console.print(str(expense), highlight=False, soft_wrap=True)
            at_once = expense.jobs
        if plan_only:
            return
        with progress_bar(console) as bar:
            task = bar.add_task("cells", total=len(cells))
            outcome = carry_out(
                what,
                request,
                cells,
                out,
                device,
                jobs=at_once,
                view=lambda title: RunView(console, f"{title}: "),
                on_cell=lambda record, done: bar.update(task, completed=done),
            )
        console.print(outcome.markdown(), highlight=False, soft_wrap=True)
        console.print(f"Table, figures, picture: {out / name}", highlight=False)


app.command(cls=OnceCommand)(with_settings(reproduce, leave_out=DECIDED))


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or (numbers == [0] and "," not in text):
        raise ValueError(f"--seeds: expected how many (at least 1), or which with commas between them, got {text!r}")
    return list(range(numbers[0])) if "," not in text else numbers


@app.command(cls=OnceCommand)
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set.")] = 25,
    seed: Annotated[int, typer.Option(help="Of weights, data order and attack noise.")] = 0,
    width: Annotated[int, typer.Option(min=1, help="Channels of the network's stem.")] = 16,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; msgd makes time ratios possible.")
    ] = "msgd,a-engm,engm",
    every_method: Annotated[
        bool, typer.Option("--all", help="All seven methods of the paper, about ten minutes.")
    ] = False,
    alpha: Annotated[float | None, typer.Option(help="ENGM's threshold; by default scaled to the network.")] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Examples a step.")] = 64,
    threads: Annotated[
        int,
        typer.Option(
            min=1,
            help="CPU threads. A second one gains a quarter on 8x8 images; beside other work it loses everything.",
        ),
    ] = 1,
    out: Annotated[Path, typer.Option(help="Folder for curves.png and results.json.")] = Path("runs/demo"),
    log: Annotated[
        LogFormat | None,
        typer.Option(help="Also write every step's and epoch's figures, to log/METHOD under the folder."),
    ] = None,
) -> None:
    """Trains a small robust network on handwritten digits with several optimizers, side by side, and compares them."""
    from ..demo import DemoSettings, demo_training, prepare, report, run
    from ..demo.live import LiveView
    from ..methods import canonical_method
    from ..runs.contents import check_free_for_several

    console = Console()
    torch.set_num_threads(threads)
    with explained_failures():
        check_free_for_several(out)
    try:
        typed = tuple(canonical_method(name) for name in methods.split(",") if name.strip())
        names = tuple(LABELS) if every_method else typed
        if log is not None:
            log.check()
        settings = DemoSettings(names, demo_training(epochs, batch_size, seed), width=width, alpha=alpha)
        with console.status("loading data and making the networks"):
            prepared = prepare(settings)
    except (ValueError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    dataset = prepared.dataset
    console.print(
        f"{len(dataset.train)} training, {len(dataset.validation)} validation and {len(dataset.test)} test images of "
        f"{dataset.name}; residual network of {prepared.parameters:,} parameters with batch norm; PGD-"
        f"{settings.attack_steps} in training mode, l-inf {settings.eps:g}; alpha {prepared.alpha:.2f}; norms from the "
        f"attack's last step; {threads} CPU thread{'s' if threads > 1 else ''}.",
        highlight=False,
    )
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with ExitStack() as stack:
        if log is not None:
            for method in prepared.runs:
                method.trainer.logger = stack.enter_context(closing(log.open(out / "log" / method.name)))
        view = stack.enter_context(LiveView(prepared, console))
        run(prepared, on_step=view.on_step, on_epoch=view.on_epoch)
    seconds = time.perf_counter() - start
    console.print(report.table(prepared))
    console.print(report.caption(prepared), highlight=False)
    report.write_json(prepared, out / "results.json", seconds=seconds)
    with console.status("drawing the curves"):
        report.draw_curves(prepared, out / "curves")
    console.print(f"{seconds:.0f} s. Curves: {out / 'curves.png'}  figures: {out / 'results.json'}", highlight=False)
    if log is not None:
        console.print(f"Every step and epoch: {out / 'log'}", highlight=False)
