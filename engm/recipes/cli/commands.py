"""The ``engm`` command."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as error:
    raise SystemExit(f"the engm command needs {error.name}: pip install 'engm[recipes]'") from error

import torch

from engm.checks import check_name

from ..config import parse_number
from ..machine import set_machine
from ..methods import LABELS
from ..processes import choose_device, from_environment
from ..runs.export import ExportFormat
from ..training.loggers import LogFormat
from .errors import explained_failures
from .options import DECIDED, chosen_settings, config_from, with_settings

if TYPE_CHECKING:
    from ..runs.folder import Which

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Adversarial training with example-normalised gradients.",
)
PIPE_COLUMNS = 160
Out = Annotated[Path, typer.Option(help="Folder of the run; one that exists is gone on with.")]
RunPath = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="DIR")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE.toml", help="Settings; options given here override them.")
]
DataRoot = Annotated[Path | None, typer.Option(help="Where named data sets lie; default: where they lay in training.")]
CheckpointName = Annotated[str, typer.Option(help="best or last.")]


def train(*, out: Out, config: ConfigFile = None, settings: dict[str, Any]) -> None:
    """Trains a robust network; the same command with the same --out goes on where it was left.

    Under torchrun, every process takes its share of each batch: torchrun --nproc-per-node 2 -m engm.recipes train ...
    """
    from ..runs.folder import RunFolder
    from ..runs.folder import train as train_in
    from ..runs.progress import RunView
    from ..runs.report import caption, draw, table

    with explained_failures(f"the same command, or engm train --out {out}, goes on where it was left"):
        folder = RunFolder(out)
        if not folder.exists and config is None and not settings:
            raise ValueError(f"there is no run in {out} to go on with; to begin one, say at least --data")
        chosen = config_from(settings, config if config or not folder.exists else folder.config_file)
        with from_environment(chosen.device) as processes:
            set_machine(chosen)
            console = _console(quiet=not processes.first)
            finished = folder.results_file.is_file()
            with RunView(console) as view:
                results = train_in(chosen, out, processes, view=view)
            if finished:
                console.print(f"The run in {out} was finished before; nothing was done.", highlight=False)
            console.print(table([results]), caption([results]), sep="\n", highlight=False)
            if processes.first and not (out / "curves.png").is_file():
                draw([results], out / "curves.png")
                console.print(f"Everything is in {out}; curves: {out / 'curves.png'}", highlight=False)


app.command()(with_settings(train))


@app.command()
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
    from ..runs.folder import RunFolder

    with explained_failures("finished attacks are kept"):
        console = _console()
        table = Table("Checkpoint", "Epoch", "Attack", "Result", box=SIMPLE_HEAD)

        def show(which: str, name: str, result: dict[str, Any]) -> None:
            value = f"{result['accuracy']:.2%}" if "accuracy" in result else _rho(result)
            table.add_row(which, str(result["epoch"]), name, value)
            console.print(f"{which}, {name}: {value} of {result['examples']} examples", highlight=False)

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
        )
        console.print(table)


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

    with explained_failures("the same command goes on where it was left"):
        check_free_for_several(out)
        chosen = config_from(settings, config, compared=True)
        with from_environment(chosen.device) as processes:
            set_machine(chosen)
            console = _console(quiet=not processes.first)
            results = compare_in(
                chosen,
                [name for name in optimizers.split(",") if name.strip()],
                _seeds(seeds),
                out,
                processes,
                view=lambda name: RunView(console, f"{name}: "),
            )
            console.print(table(results), caption(results), sep="\n", highlight=False)
            console.print(f"Table, figures and curves: {out}/comparison.md, .json, .png", highlight=False)


app.command()(with_settings(compare, leave_out=("optimizer", "seed")))


def reproduce(
    name: Annotated[str, typer.Argument(help="table1 to table5, fig2 to fig5; fig5a, d, f, g: one panel.")],
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

    with explained_failures("the same command goes on where it was left"):
        check_free_for_several(out)
        chosen = budget_named(budget)
        numbers = list(range(chosen.seeds)) if seeds is None else _seeds(seeds)
        what = analysis(name)
        if optimizers is not None and name != "table2":
            raise ValueError(f"--optimizers is for table2; {name} has its own")
        compared = tuple(LABELS) if optimizers is None else tuple(o for o in optimizers.split(",") if o.strip())
        request = Request(chosen, chosen_settings(settings, config), numbers, compared)
        cells = what.cells(request)
        device = choose_device(cells[0].config.device)
        set_machine(cells[0].config.resolved())
        console = _console()
        console.print(f"{what.title}; budget {chosen.name}: {chosen.purpose}.", highlight=False, soft_wrap=True)
        expense = expense_of(cells, out / "runs", device, jobs)
        console.print(str(expense), highlight=False, soft_wrap=True)
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
                jobs=expense.jobs,
                view=lambda title: RunView(console, f"{title}: "),
                on_cell=lambda record, done: bar.update(task, completed=done),
            )
        console.print(outcome.markdown(), highlight=False, soft_wrap=True)
        console.print(f"Table, figures, picture: {out / name}", highlight=False)


app.command()(with_settings(reproduce, leave_out=DECIDED))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, analyses of engm reproduce, or folders of these.", metavar="DIR...")],
    out: Annotated[Path | None, typer.Option(help="Folder for report.md and report.png; default: only print.")] = None,
) -> None:
    """One table of finished runs, mean and deviation over seeds, and their learning curves.

    Takes what engm train, compare and reproduce wrote, and any folder above.
    """
    from ..runs.report import caption, collect, draw, markdown, table
    from ..storage.atomic_files import make_folder, write_text_atomic

    with explained_failures():
        results, unfinished = collect(runs)
        console = _console()
        if unfinished:
            console.print(f"Not finished, so not shown: {', '.join(map(str, unfinished))}", highlight=False)
        if not results:
            raise FileNotFoundError("none of these runs is finished")
        console.print(table(results), caption(results), sep="\n", highlight=False)
        if out is not None:
            make_folder(out)
            write_text_atomic(out / "report.md", markdown(results))
            draw(results, out / "report.png")
            console.print(f"{out / 'report.md'} and {out / 'report.png'}", highlight=False)


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="File to write.")],
    kind: Annotated[ExportFormat | None, typer.Option("--format", help="Default: by the ending of --out.")] = None,
    checkpoint: CheckpointName = "best",
    data_root: DataRoot = None,
) -> None:
    """Writes a run's weights (safetensors, pt) or program (pt2, by torch.export) to a file."""
    from ..runs.export import export as export_to
    from ..runs.folder import RunFolder

    with explained_failures():
        check_name(out.suffix[1:] if kind is None else kind, list(ExportFormat), what="export format (--format)")
        (which,) = _checkpoints(checkpoint, both=False)
        epoch = export_to(RunFolder(run), out, ExportFormat(kind or out.suffix[1:]), which, data_root)
        _console().print(f"{which} weights (epoch {epoch}) in {out}", highlight=False)


@app.command()
def doctor(
    data_root: Annotated[Path, typer.Option(help="Where named data sets would lie.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Where runs would be written.")] = Path("runs"),
) -> None:
    """Looks at build, GPU, packages, data and disk, and says what to do."""
    from ..doctor import examine

    findings = examine(data_root, out)
    colours = {"ok": "green", "note": "yellow", "bad": "bold red"}
    table = Table("", "", "", box=None, show_header=False)
    for finding in findings:
        table.add_row(finding.what, Text(finding.state, style=colours[finding.state]), finding.detail)
    _console().print(table, highlight=False)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


def _checkpoints(name: str, *, both: bool = True) -> tuple[Which, ...]:
    check_name(name, ("best", "last", "both") if both else ("best", "last"), what="checkpoint (--checkpoint)")
    return ("best", "last") if name == "both" else (name,)  # type: ignore[return-value]


def _console(*, quiet: bool = False) -> Console:
    """A console as wide as the terminal; a file or a pipe, where nobody looks, is wide enough for every table."""
    return Console(quiet=quiet, width=None if sys.stdout.isatty() else PIPE_COLUMNS, markup=False)


def _rho(result: dict[str, Any]) -> str:
    return "no adversary found" if result["rho"] is None else f"rho {result['rho']:.4f}"


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or (numbers == [0] and "," not in text):
        raise ValueError(f"--seeds: expected how many (at least 1), or which with commas between them, got {text!r}")
    return list(range(numbers[0])) if "," not in text else numbers


@app.command()
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
