"""How commands meet the terminal: what they print to, and options that may be given once."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from typer.core import TyperCommand, TyperOption

PIPE_COLUMNS = 160


def console_for(*, quiet: bool = False) -> Console:
    """A console as wide as the terminal; a file or a pipe, where nobody looks, is wide enough for every table."""
    return Console(quiet=quiet, width=None if sys.stdout.isatty() else PIPE_COLUMNS, markup=False)


class OnceCommand(TyperCommand):
    """A command that refuses an option which is given twice, instead of taking the last one without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the command line.

        Raises:
            typer.BadParameter: an option that takes one value has two, or both of its forms.
        """
        if args or not self.no_args_is_help:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for parameter in order:
                once = isinstance(parameter, TyperOption) and not parameter.multiple
                if once and order.count(parameter) > 1:
                    names = "/".join([*parameter.opts, *parameter.secondary_opts])
                    ctx.fail(f"{names} is given {order.count(parameter)} times: leave all but one of them out")
        return super().parse_args(ctx, args)
