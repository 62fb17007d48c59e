"""How commands meet the terminal: what they print to, and options that may be given once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from typer.core import TyperCommand, TyperOption

PIPE_COLUMNS = 160
PACKAGE = Path(__file__).parents[2]


def console_for(*, quiet: bool = False) -> Console:
    """A console as wide as the terminal; a file or a pipe, where nobody looks, is wide enough for every table."""
    # Without a standard output, as a service may have none, there is nobody who reads.
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(quiet=quiet, width=None if terminal else PIPE_COLUMNS, markup=False)


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Python prints a warning as ``engm: warning: MESSAGE``, without the file and the source line of who warns.

    A warning that comes from elsewhere, from a network of the user's own or from a library, is followed by its place.
    Which warnings are shown, and who catches them, stays as it is.
    """
    before = warnings.formatwarning
    warnings.formatwarning = _in_a_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _in_a_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    ours = Path(filename).is_relative_to(PACKAGE)
    place = "" if ours else f" ({category.__name__} at {filename}:{lineno})"
    return f"engm: warning: {' '.join(str(message).split())}{place}\n"


# What official code of adversarial training and torchvision's scripts call options that have other names here.
ELSEWHERE = {
    "arch": "model",
    "net": "model",
    "dataset": "data",
    "data-dir": "data-root",
    "data-path": "data-root",
    "learning-rate": "lr",
    "lr-max": "lr",
    "wd": "weight-decay",
    "num-epochs": "epochs",
    "epsilon": "eps",
    "attack-iters": "attack-steps",
    "num-steps": "attack-steps",
    "pgd-alpha": "step-size",
    "attack-type": "attack",
    "trades-beta": "beta",
    "lambda": "beta",
    "output-dir": "out",
    "save-dir": "out",
    "fname": "out",
    "batchsize": "batch-size",
    "num-workers": "workers",
    "lr-schedule": "schedule",
    "label-smooth": "label-smoothing",
    "resume": "out",
}


class OnceCommand(TyperCommand):
    """A command that refuses an option which is given twice, instead of taking the last one without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the command line.

        Raises:
            typer.BadParameter: an option that takes one value has two, or both of its forms, or has another name here.
        """
        known = {name for parameter in self.get_params(ctx) for name in (*parameter.opts, *parameter.secondary_opts)}
        for typed in (argument.split("=")[0] for argument in args if argument.startswith("--")):
            here = _name_here(typed)
            if typed not in known and here in known:
                ctx.fail(f"No such option: {typed}; here it is {here}")
        if args or not self.no_args_is_help:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for parameter in order:
                once = isinstance(parameter, TyperOption) and not parameter.multiple
                if once and order.count(parameter) > 1:
                    names = "/".join([*parameter.opts, *parameter.secondary_opts])
                    ctx.fail(f"{names} is given {order.count(parameter)} times: leave all but one of them out")
        return super().parse_args(ctx, args)


def _name_here(typed: str) -> str:
    """What an option of other scripts is called here, if it is here at all."""
    name = typed.lstrip("-").replace("_", "-").lower()
    return f"--{ELSEWHERE.get(name, name)}"
