"""The ``engm`` command as a list of names and lines of help; torch is imported once one of the commands is chosen."""

from __future__ import annotations

import platform
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from typer.core import TyperCommand, TyperGroup
except ModuleNotFoundError as error:
    raise SystemExit(f"the engm command needs {error.name}: pip install 'engm[recipes]'") from error

from .terminal import warnings_in_a_line

if TYPE_CHECKING:
    from typer import Context

# Every command: the module of this package that has it, and the first line of its help, for the list of commands.
COMMANDS = {
    "train": ("training", "Trains a robust network; the same command with the same --out goes on where it was left."),
    "evaluate": (
        "evaluating",
        "Attacks a run's checkpoints, or weights in a file, on the test set; results are kept beside them.",
    ),
    "compare": (
        "training",
        "Trains with several optimizers and seeds, everything else alike, and makes one table; finished runs are kept.",
    ),
    "reproduce": (
        "reproducing",
        "Repeats a figure or table of the paper, or all, at a budget: plan, runs, table beside the paper's, picture.",
    ),
    "report": ("results", "One table of finished runs, mean and deviation over seeds, and their learning curves."),
    "export": (
        "results",
        "Writes a run's weights (safetensors, pt) or program (pt2 by torch.export, onnx) to a file, and reads it back.",
    ),
    "doctor": ("results", "Looks at build, kernels, GPU, packages, data and disk, and says what to do."),
    "demo": (
        "training",
        "Trains a small robust network on handwritten digits with several optimizers, side by side, and compares them.",
    ),
}


class LazyCommand(TyperCommand):
    """A command by its name and its line of help, which imports the real one when it is called.

    Args:
        name: its name.
        module: module of this package that has the command.
        help: its line of help.
    """

    def __init__(self, name: str, module: str, help: str) -> None:
        super().__init__(name, help=help)
        self._module = module

    def real(self) -> TyperCommand:
        """The command itself."""
        # Which takes seconds; on standard error, where somebody looks who pipes the output into a file.
        with Console(stderr=True).status("loading torch"):
            module = import_module(f"{__package__}.{self._module}")
        commands: dict[str, TyperCommand] = typer.main.get_group(module.app).commands  # type: ignore[assignment]
        return commands[str(self.name)]

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Context:
        """The context of the real command, which is then what runs."""
        return self.real().make_context(info_name, args, parent=parent, **extra)  # type: ignore[return-value]


class Commands(TyperGroup):
    """All commands, none of which is imported before it is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, (module, help) in COMMANDS.items():
            self.add_command(LazyCommand(name, module, help))


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_show_locals=False)


def _version(asked: bool) -> None:
    """Prints versions, from what is installed, because importing torch takes seconds."""
    if asked:
        typer.echo(f"engm {_installed('engm')}, torch {_installed('torch')}, Python {platform.python_version()}")
        raise typer.Exit


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # a source tree on the path
        return "not installed"


@app.callback()
def engm(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Adversarial training with example-normalised gradients."""
    context.with_resource(warnings_in_a_line())
