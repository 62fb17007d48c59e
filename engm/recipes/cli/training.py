"""The commands that train: ``engm train``, ``compare`` and ``demo``."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ..config import MOST_THREADS
from ..machine import set_machine
from ..methods import LABELS
from ..processes import from_environment
from ..training.loggers import LogFormat
from .errors import explained_failures
from .options import ConfigFile, config_from, go_on, seeds_from, with_settings
from .terminal import OnceCommand, console_for

app = typer.Typer()
Out = Annotated[Path, typer.Option(help="Folder of the run; one that exists is gone on with.")]


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

    folder = RunFolder(out)
    # Before the folder has its settings, only the whole command goes on.
    with explained_failures(lambda: go_on(f"engm train --out {quote(str(out))}" if folder.exists else "")):
        if not folder.exists and config is None and not settings:
            raise ValueError(f"there is no run in {out} to go on with; to begin one, say at least --data")
        source = config if config or not folder.exists else folder.config_file
        chosen = config_from(settings, source, trained=folder.was_trained and not config)
        with from_environment(chosen.device) as processes:
            set_machine(chosen)
            console = console_for(quiet=not processes.first)
            chosen = folder.check_free_for(chosen)
            finished = folder.is_over(chosen)
            opening = opening_line(folder, chosen)
            if finished:
                console.print(opening, highlight=False, soft_wrap=True)
            with RunView(console, opening=opening) as view:
                results = train_in(chosen, out, processes, view=view)
            console.print(table([results]), caption([results]), sep="\n", highlight=False)
            if processes.first and not (finished and (out / "curves.png").is_file()):
                with console.status("drawing the curves"):
                    draw([results], out / "curves")
                console.print(f"Everything is in {out}; curves: {out / 'curves.png'}, .svg, .pdf", highlight=False)


app.command(cls=OnceCommand)(with_settings(train))


def compare(
    *,
    out: Out,
    optimizers: Annotated[str | None, typer.Option(help="Comma-separated.", show_default=",".join(LABELS))] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many (3 is 0,1,2), or which: 4,7 or 4, alone.", show_default="3")
    ] = None,
    config: ConfigFile = None,
    settings: dict[str, Any],
) -> None:
    """Trains with several optimizers and seeds, everything else alike, and makes one table; finished runs are kept.

    With --out alone a comparison that was begun there goes on; what is given beside it is changed: --seeds 5, say.
    """
    from ..runs.compare import Plan
    from ..runs.compare import compare as compare_in
    from ..runs.contents import check_free_for_several
    from ..runs.progress import RunView
    from ..runs.report import caption, table

    with explained_failures(lambda: go_on(f"engm compare --out {quote(str(out))}" if Plan.is_in(out) else "")):
        check_free_for_several(out)
        begun = Plan.of(out)
        if begun is None and (config, optimizers, seeds, settings) == (None, None, None, {}):
            raise ValueError(f"there is no comparison in {out} to go on with; to begin one, say at least --data")
        own, trained = (None, False) if begun is None else (begun.config, begun.was_trained(out) and not config)
        chosen = config_from(settings, config, own=own, compared=True, trained=trained)
        plan = Plan(
            chosen if begun is None else begun.going_on(chosen, out),
            begun.optimizers if begun and optimizers is None else _names(optimizers or ",".join(LABELS)),
            begun.seeds if begun and seeds is None else seeds_from(seeds or "3"),
        )
        with from_environment(plan.config.device) as processes:
            set_machine(plan.config)
            console = console_for(quiet=not processes.first)
            if begun is not None:
                named = f"{', '.join(plan.optimizers)}; seeds {', '.join(map(str, plan.seeds))}"
                console.print(f"Going on with the comparison in {out}: {named}.", highlight=False, soft_wrap=True)
            results = compare_in(
                plan.config,
                plan.optimizers,
                plan.seeds,
                out,
                processes,
                view=lambda name: RunView(console, f"{name}: "),
            )
            console.print(table(results), caption(results), sep="\n", highlight=False)
            console.print(f"Table, figures and curves: {out}/comparison.md, .json, .png, .svg, .pdf", highlight=False)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name.strip()]


app.command(cls=OnceCommand)(with_settings(compare, leave_out=("optimizer", "seed")))


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
            max=MOST_THREADS,
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
    from ..storage.atomic_files import make_folder

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
    with explained_failures():
        make_folder(out)
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
