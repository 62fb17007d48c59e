"""How commands fail: one clear message on standard error and a non-zero exit, for whatever a user can mend."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from engm.checks import NonFiniteError, RefusedError

from ..failures import CheckpointError, OtherProcessError
from ..runs.termination import STATUS as TERMINATED
from ..runs.termination import TerminatedError, raised
from ..storage.folder_lock import FolderInUseError

_EXACT = "wrap with GradNormModule(net, coupled='exact')"  # what a refusal says to people who write Python
INTERRUPTED = 130  # what shells report for Ctrl-C
_MEMORY = "out of memory: try a smaller --batch-size, a smaller --width, --precision bf16 or --in-memory no"
_EXPECTED = (ValueError, OSError, ModuleNotFoundError, CheckpointError, FolderInUseError, OtherProcessError)


@contextmanager
def explained_failures(resume: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Put around a command's work, says what failed. Other exceptions are faults of ours and keep their traceback.

    Args:
        resume: says how to go on after an interruption, for the message; it is called after the interruption.

    Raises:
        typer.Exit: with status 1, 130 after Ctrl-C, or 143 after SIGTERM.
    """
    try:
        with raised():
            yield
    except KeyboardInterrupt:
        _say(_interrupted("interrupted", resume()))
        raise typer.Exit(INTERRUPTED) from None
    except MemoryError:
        _say(_MEMORY)
        raise typer.Exit(1) from None
    except TerminatedError as error:
        _say(_interrupted(str(error), resume()))
        raise typer.Exit(TERMINATED) from None
    except NonFiniteError as error:
        _say(f"{error}: training diverged. Try a smaller --lr or --alpha in another --out.")
        raise typer.Exit(1) from None
    except RefusedError as error:
        _say(str(error).replace("engm: ", "", 1).replace(_EXACT, "add --coupled exact"))
        raise typer.Exit(1) from None
    except _EXPECTED as error:
        _say(str(error))
        raise typer.Exit(1) from None
    except RuntimeError as error:
        # By its name, because torch need not be there; the text is what torch says on a CPU.
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        _say(_MEMORY)
        raise typer.Exit(1) from None


def _interrupted(what: str, resume: str) -> str:
    return f"{what}; {resume}" if resume else what


def _say(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    Console(stderr=True, soft_wrap=True).print(f"[bold red]engm{where}:[/] {escape(message)}", highlight=False)
