"""The commands that look at what was trained and at the machine: ``evaluate``, ``report``, ``export``, ``doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from engm.checks import check_name

from ..config import parse_number
from ..processes import choose_device
from ..runs.export import ExportFormat
from .errors import explained_failures
from .terminal import OnceCommand, console_for

if TYPE_CHECKING:
    from ..runs.files import Which

app = typer.Typer()
RunPath = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="DIR")]
DataRoot = Annotated[Path | None, typer.Option(help="Where named data sets lie; default: where they lay in training.")]
CheckpointName = Annotated[str, typer.Option(help="best or last.")]


@app.command(cls=OnceCommand)
def evaluate(
    run: RunPath,
    attack: Annotated[
        list[str], typer.Option(help="natural, pgdN, pgdN-ce, autoattack or deepfool; may be given several times.")
    ] = ["pgd20"],  # noqa: B006
    checkpoint: Annotated[str, typer.Option(help="best, last or both.")] = "both",
    examples: Annotated[int | None, typer.Option(min=1, help="The first so many of the test set; default all.")] = None,
    eps: Annotated[str | None, typer.Option(metavar="NUMBER", help="As 0.03 or 8/255; default the run's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples at a time.")] = 500,
    data_root: DataRoot = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Attacks the checkpoints of a run on the test set; results are kept in DIR/evaluation.json."""
    from ..runs.evaluation import assess
    from ..runs.files import RunFolder
    from ..runs.progress import progress_bar

    with explained_failures("finished attacks are kept"):
        console = console_for()
        table = Table("Checkpoint", "Epoch", "Attack", "Result", box=SIMPLE_HEAD)

        def show(which: str, name: str, result: dict[str, Any]) -> None:
            value = f"{result['accuracy']:.2%}" if "accuracy" in result else _rho(result)
            table.add_row(which, str(result["epoch"]), name, value)
            console.print(f"{which}, {name}: {value} of {result['examples']} examples", highlight=False)

        with progress_bar(console, transient=True) as bar:
            task = bar.add_task("loading data and network", total=None)

            def follow(what: str, done: int, total: int | None) -> None:
                bar.update(task, description=what, completed=done, total=total)

            assess(
                RunFolder(run),
                [name.lower() for name in attack],
                checkpoints=_checkpoints(checkpoint),
                examples=examples,
                eps=None if eps is None else parse_number(eps),
                batch_size=batch_size,
                data_root=data_root,
                device=choose_device(device),
                on_result=show,
                on_progress=follow,
            )
        console.print(table)


@app.command(cls=OnceCommand)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders, analyses of engm reproduce, or folders of these.", metavar="DIR..."),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for report.md and report.png; default: only print.")] = None,
) -> None:
    """One table of finished runs, mean and deviation over seeds, and their learning curves.

    Takes what engm train, compare and reproduce wrote, and any folder above.
    """
    from ..runs.report import caption, collect, draw, markdown, table
    from ..storage.atomic_files import make_folder, write_text_atomic

    with explained_failures():
        console = console_for()
        with console.status("reading runs"):
            results, unfinished = collect(runs)
        if unfinished:
            console.print(f"Not finished, so not shown: {', '.join(map(str, unfinished))}", highlight=False)
        if not results:
            raise FileNotFoundError("none of these runs is finished")
        console.print(table(results), caption(results), sep="\n", highlight=False)
        if out is not None:
            make_folder(out)
            write_text_atomic(out / "report.md", markdown(results))
            with console.status("drawing"):
                draw(results, out / "report.png")
            console.print(f"{out / 'report.md'} and {out / 'report.png'}", highlight=False)


@app.command(cls=OnceCommand)
def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="File to write.")],
    kind: Annotated[ExportFormat | None, typer.Option("--format", help="Default: by the ending of --out.")] = None,
    checkpoint: CheckpointName = "best",
    data_root: DataRoot = None,
) -> None:
    """Writes a run's weights (safetensors, pt) or program (pt2, by torch.export) to a file."""
    from ..runs.export import export as export_to
    from ..runs.files import RunFolder

    with explained_failures():
        check_name(out.suffix[1:] if kind is None else kind, list(ExportFormat), what="export format (--format)")
        (which,) = _checkpoints(checkpoint, both=False)
        console = console_for()
        with console.status("reading and writing the network"):
            epoch = export_to(RunFolder(run), out, ExportFormat(kind or out.suffix[1:]), which, data_root)
        console.print(f"{which} weights (epoch {epoch}) in {out}", highlight=False)


@app.command(cls=OnceCommand)
def doctor(
    data_root: Annotated[Path, typer.Option(help="Where named data sets would lie.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Where runs would be written.")] = Path("runs"),
) -> None:
    """Looks at build, kernels, GPU, packages, data and disk, and says what to do."""
    from ..doctor import examine, try_kernels

    console = console_for()
    with console.status("looking at build, kernels, packages and disk"):
        kernels = try_kernels()
        findings = examine(data_root, out, kernels)
    colours = {"ok": "green", "note": "yellow", "bad": "bold red"}
    table = Table("", "", "", box=None, show_header=False)
    for finding in findings:
        table.add_row(finding.what, Text(finding.state, style=colours[finding.state]), finding.detail)
    console.print(table, highlight=False)
    for report in kernels:
        console.print(f"\n{report}", highlight=False)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


def _checkpoints(name: str, *, both: bool = True) -> tuple[Which, ...]:
    check_name(name, ("best", "last", "both") if both else ("best", "last"), what="checkpoint (--checkpoint)")
    return ("best", "last") if name == "both" else (name,)  # type: ignore[return-value]


def _rho(result: dict[str, Any]) -> str:
    return "no adversary found" if result["rho"] is None else f"rho {result['rho']:.4f}"
