"""The commands that look at what was trained and at the machine: ``report``, ``export``, ``doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from engm.checks import check_name

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
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders, analyses of engm reproduce, or folders of these.", metavar="DIR..."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.md and report.png, .svg, .pdf; default: only print.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One web page with all of it, that stands alone, to write.")
    ] = None,
) -> None:
    """One table of finished runs, mean and deviation over seeds, and their learning curves.

    Takes what engm train, compare and reproduce wrote, and any folder above.
    """
    from ..runs.curves import draw
    from ..runs.report import caption, collect, markdown, table
    from ..storage.atomic_files import make_folder, write_text_atomic

    with explained_failures():
        if html is not None and html.is_dir():
            raise ValueError(f"--html {html} is a folder; it has to name the file to write, as {html / 'report.html'}")
        console = console_for()
        analyses, alone = _analyses(runs) if html is not None else ({}, [])
        with console.status("reading runs"):
            results, unfinished = collect([path for path in runs if path not in alone])
        if unfinished:
            console.print(f"Not finished, so not shown: {', '.join(map(str, unfinished))}", highlight=False)
        if results:
            console.print(table(results), caption(results), sep="\n", highlight=False)
        elif out is not None or not analyses:
            raise FileNotFoundError(f"none of these runs is finished{_ALONE if analyses else ''}")
        if out is not None:
            make_folder(out)
            write_text_atomic(out / "report.md", markdown(results))
            with console.status("drawing"):
                draw(results, out / "report")
            console.print(f"Table: {out / 'report.md'}; curves: {out / 'report.png'}, .svg, .pdf", highlight=False)
        if html is not None:
            from ..reproduce.web_report import write_report

            make_folder(html.parent)
            with console.status("drawing"):
                write_report(html, results, unfinished, analyses)
            console.print(f"The page: {html}", highlight=False)
        if out is None and html is None:
            console.print("--out DIR writes table and learning curves, --html FILE a web page.", highlight=False)


_ALONE = ", or there are none: of the analyses here --html makes a page, but --out cannot make a table of runs"


def _analyses(paths: list[Path]) -> tuple[dict[Path, dict[str, Any]], list[Path]]:
    """The analyses that paths hold, and those of the paths that hold nothing else."""
    from ..reproduce.web_report import analyses_in, without_runs

    found = analyses_in(paths)
    return found, without_runs(paths, found)


@app.command(cls=OnceCommand)
def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="File to write.")],
    kind: Annotated[ExportFormat | None, typer.Option("--format", help="Default: by the ending of --out.")] = None,
    checkpoint: CheckpointName = "best",
    data_root: DataRoot = None,
) -> None:
    """Writes a run's weights (safetensors, pt) or program (pt2 by torch.export, onnx) to a file, and reads it back."""
    from ..runs.export import export as export_to
    from ..runs.files import RunFolder

    with explained_failures():
        ending = {"pth": "pt"}.get(out.suffix[1:].lower(), out.suffix[1:].lower())
        check_name(ending if kind is None else kind, list(ExportFormat), what="export format (--format)")
        (which,) = checkpoints_named(checkpoint, both=False)
        console = console_for()
        with console.status("reading and writing the network"):
            epoch = export_to(RunFolder(run), out, ExportFormat(kind or ending), which, data_root)
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


def checkpoints_named(name: str, *, both: bool = True) -> tuple[Which, ...]:
    """The checkpoints that ``--checkpoint`` means.

    Raises:
        ValueError: there is none of that name.
    """
    check_name(name, ("best", "last", "both") if both else ("best", "last"), what="checkpoint (--checkpoint)")
    return ("best", "last") if name == "both" else (name,)  # type: ignore[return-value]
