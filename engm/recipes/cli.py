"""The ``engm`` command."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as error:
    raise SystemExit(f"the engm command needs {error.name}: pip install 'engm[recipes]'") from error

import torch

from .loggers import LogFormat

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Adversarial training with example-normalised gradients.",
)


@app.callback()
def main() -> None:
    """Keeps subcommands subcommands, however many there are."""


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set.")] = 25,
    seed: Annotated[int, typer.Option(help="Of weights, data order and attack noise.")] = 0,
    width: Annotated[int, typer.Option(min=1, help="Channels of the network's stem.")] = 16,
    methods: Annotated[str, typer.Option(help="Comma-separated; msgd makes time ratios possible.")] = "msgd,aengm,engm",
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
    from . import report
    from .demo import DemoSettings, demo_training, prepare, run
    from .live import LiveView
    from .methods import METHODS

    console = Console()
    torch.set_num_threads(threads)
    names = tuple(METHODS) if every_method else tuple(n.strip().lower() for n in methods.split(",") if n.strip())
    try:
        if log is not None:
            log.check()
        settings = DemoSettings(names, demo_training(epochs, batch_size, seed), width=width, alpha=alpha)
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
    report.draw_curves(prepared, out / "curves.png")
    console.print(f"{seconds:.0f} s. Curves: {out / 'curves.png'}  figures: {out / 'results.json'}", highlight=False)
    if log is not None:
        console.print(f"Every step and epoch: {out / 'log'}", highlight=False)


if __name__ == "__main__":
    app()
