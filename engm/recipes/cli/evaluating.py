"""The command that attacks what was trained: ``engm evaluate``, on run folders and on files of weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from engm.checks import check_name

from ..config import THREATS, option, parse_number
from ..config_files import from_values
from ..devices import choose_device
from ..spelling import shown_radius
from .errors import explained_failures
from .results import DataRoot, checkpoints_named
from .terminal import OnceCommand, console_for

if TYPE_CHECKING:
    from ..evaluation.subjects import WeightsFile
    from ..evaluation.target import Answers, Place

app = typer.Typer()
Place_ = Annotated[Path, typer.Argument(help="Folder of a run, or a file of weights.", metavar="DIR|FILE")]
OF_FILES = "Files of weights"
FIGURES = "More than one figure"


@app.command(cls=OnceCommand)
def evaluate(
    place: Place_,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="natural, pgdN (N steps on the margin loss, as of CW), pgdN-ce, autoattack, autoattack-rand (for "
            "random networks), autoattack-untargeted (for fewer than four classes) or deepfool; several with commas "
            "between them, or by giving the option again. Default: pgd20, and none with --corruptions."
        ),
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="best, last or both (the default); of a run.")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="The first so many of the test set; default all.")] = None,
    threat: Annotated[str | None, typer.Option(help="linf or l2; default the run's, of files linf.")] = None,
    eps: Annotated[
        str | None,
        typer.Option(metavar="NUMBER", help="As 0.03 or 8/255; default the run's, of files 8/255 or 128/255."),
    ] = None,
    eps_sweep: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Radii as 0,2/255,4/255,8/255: a curve, as sweep.json and .png.",
            rich_help_panel=FIGURES,
        ),
    ] = None,
    corruptions: Annotated[
        Path | None,
        typer.Option(help="A folder as CIFAR-10-C's: a table by corruption, and the mean.", rich_help_panel=FIGURES),
    ] = None,
    transfer_from: Annotated[
        Path | None,
        typer.Option(help="Run or file whose network the adversarial examples are made on.", rich_help_panel=FIGURES),
    ] = None,
    transfer_model: Annotated[
        str | None, typer.Option(help="Network of that file; default: as --model.", rich_help_panel=FIGURES)
    ] = None,
    model: Annotated[str | None, typer.Option(help="As engm train --model.", rich_help_panel=OF_FILES)] = None,
    data: Annotated[str | None, typer.Option(help="As engm train --data.", rich_help_panel=OF_FILES)] = None,
    width: Annotated[int | None, typer.Option(help="As engm train --width.", rich_help_panel=OF_FILES)] = None,
    norm: Annotated[str | None, typer.Option(help="As engm train --norm.", rich_help_panel=OF_FILES)] = None,
    image_size: Annotated[
        int | None, typer.Option(help="As engm train --image-size.", rich_help_panel=OF_FILES)
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            help="Inputs are normalised by this mean before the network; default: as the file says, or not at all.",
            rich_help_panel=OF_FILES,
        ),
    ] = None,
    std: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="And by this deviation.", rich_help_panel=OF_FILES)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples at a time.")] = 500,
    data_root: DataRoot = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Attacks a run's checkpoints, or weights in a file, on the test set; results are kept beside them.

    A file is a state_dict, a checkpoint with one in it, or safetensors; --model and --data say what it is of.
    """
    from ..evaluation.sweep import write_sweep
    from ..evaluation.target import Wanted, evaluated
    from ..runs.progress import progress_bar

    with explained_failures(lambda: "finished attacks are kept"):
        console = console_for()
        if threat is not None:
            check_name(threat, THREATS, what="--threat")
        if place.is_file() and checkpoint is not None:
            raise ValueError("--checkpoint is for runs; a file has one network")
        settings = {"model": model, "data": data, "width": width, "norm": norm, "image_size": image_size}
        reading = _Reading(settings, _numbers("--mean", mean), _numbers("--std", std), data_root)
        subject, source = _places(place, transfer_from, transfer_model, reading)
        wanted = Wanted(
            [name for names in attack or () for name in names.split(",") if name.strip()]
            or ([] if corruptions is not None and not (eps_sweep or transfer_from) else ["pgd20"]),
            checkpoints_named(checkpoint or "both"),
            examples,
            threat,
            None if eps is None else parse_number(eps),
            _numbers("--eps-sweep", eps_sweep) or (),
            corruptions,
            source,
            batch_size,
        )
        with progress_bar(console, transient=True) as bar:
            task = bar.add_task("loading data and network", total=None)

            def follow(what: str, done: int, total: int | None) -> None:
                bar.update(task, description=what, completed=done, total=total)

            def show(name: str, asked: str, result: dict[str, Any]) -> None:
                at = f", eps {shown_radius(result['eps'])}" if "eps" in result else ""
                console.print(
                    f"{name}, {asked}{at}: {_value(result)} of {result['examples']} examples", highlight=False
                )

            answers = evaluated(
                subject, wanted, choose_device(device), data_root=data_root, on_result=show, on_progress=follow
            )
        _print_tables(console, answers)
        if wanted.sweep:
            files = write_sweep(subject, answers)
            console.print(f"The curve: {files[0]} and {files[1]}", highlight=False)


@dataclass(frozen=True)
class _Reading:
    """How files of weights are read.

    Attributes:
        settings: options of ``engm train`` by name; None where they were not given.
        mean: of ``--mean``.
        std: of ``--std``.
        data_root: of ``--data-root``.
    """

    settings: dict[str, Any]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    data_root: Path | None

    def file(self, path: Path, **other: Any) -> WeightsFile:
        """A file, with other settings than the command line's where these are given."""
        from ..evaluation.subjects import WeightsFile

        given = {name: value for name, value in {**self.settings, **other}.items() if value is not None}
        missing = [name for name in ("model", "data") if name not in given]
        if missing:
            raise ValueError(
                f"{path} is a file of weights: say with {' and '.join(map(option, missing))} what it is of"
            )
        root = {} if self.data_root is None else {"data_root": str(self.data_root)}
        config = from_values({**given, **root}, source="the command line").resolved()
        return WeightsFile(path, config, self.mean, self.std)

    def check_unused(self, path: Path, names: Iterable[str]) -> None:
        """Refuses settings that a run says itself."""
        given = [
            option(name) for name in names if {**self.settings, "mean": self.mean, "std": self.std}[name] is not None
        ]
        if given:
            raise ValueError(f"{', '.join(given)} is for files of weights; the run in {path} says its own")


def _places(
    place: Path, transfer_from: Path | None, transfer_model: str | None, reading: _Reading
) -> tuple[Place, Place | None]:
    """What is evaluated, and where adversarial examples are made if elsewhere; each a run or a file."""
    from ..runs.files import RunFolder

    from_file = transfer_from is not None and transfer_from.is_file()
    if transfer_model is not None and not from_file:
        raise ValueError("--transfer-model is for a file of weights in --transfer-from")
    subject: Place
    if place.is_file():
        subject = reading.file(place)
        data = reading.settings["data"]
    else:
        subject = RunFolder(place)
        data = subject.config(reading.data_root).data
        # Where a file is read beside the run, what says how is of that file.
        reading.check_unused(place, ("model", "data") if from_file else (*reading.settings, "mean", "std"))
    if transfer_from is None:
        return subject, None
    if not from_file:
        return subject, RunFolder(transfer_from)
    model = transfer_model or reading.settings["model"]
    if model is None:
        raise ValueError(f"{transfer_from} is a file of weights: say with --transfer-model of which network")
    return subject, reading.file(transfer_from, model=model, data=data)


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(parse_number(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name}: {error}, with commas between the numbers") from None


def _print_tables(console: Console, answers: Answers) -> None:
    """A table of attacks, with the attacks that AutoAttack consists of, and one of corruptions."""
    from ..evaluation.asking import Attacked, Corrupted
    from ..evaluation.corruptions import SEVERITIES, left_out, mean_accuracy

    attacks = Table("Weights", "Epoch", "Attack", "eps", "Result", box=SIMPLE_HEAD)
    corrupted = Table("Weights", "Corruption", *map(str, range(1, SEVERITIES + 1)), "Mean", box=SIMPLE_HEAD)
    for name, asked in answers.items():
        accuracies = {}
        for question, result in asked:
            if isinstance(question, Attacked):
                eps = f"{question.ball.norm} {shown_radius(result['eps'])}" if "eps" in result else ""
                attacks.add_row(name, str(result.get("epoch", "")), question.name, eps, _value(result))
                for part, accuracy in result.get("attacks", {}).items():
                    shown = "  natural" if part == "clean" else f"  after {part}"
                    attacks.add_row("", "", shown, "", f"{accuracy:.2%}", style="dim")
            elif isinstance(question, Corrupted):
                accuracies[question.corruption.name] = result["accuracy"]
                cells = [f"{accuracy:.2%}" for accuracy in (*result["severities"], result["accuracy"])]
                corrupted.add_row(name, question.corruption.name, *cells)
        if accuracies:
            without = left_out(accuracies)
            shown = f"mean{' without ' + ', '.join(without) if without else ''}"
            cells = [""] * SEVERITIES
            corrupted.add_row(name, shown, *cells, f"{mean_accuracy(accuracies):.2%}", style="bold")
    for table in (attacks, corrupted):
        if table.row_count:
            console.print(table)
    for name, asked in answers.items():
        for question, result in asked:
            for warning in result.get("warnings", []):
                console.print(f"{name}, {question.name}: {warning}", style="yellow", highlight=False, soft_wrap=True)


def _value(result: dict[str, Any]) -> str:
    if "accuracy" in result:
        return f"{result['accuracy']:.2%}"
    return "no adversary found" if result["rho"] is None else f"rho {result['rho']:.4f}"
