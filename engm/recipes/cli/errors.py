"""How commands fail: one clear message on standard error and a non-zero exit, for whatever a user can mend."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from engm.checks import NonFiniteError, RefusedError

from ..addresses import addresses_noted, failure_of_own_code
from ..failures import INTERRUPTED, CheckpointError, OtherProcessError
from ..runs.termination import STATUS as TERMINATED
from ..runs.termination import TerminatedError, raised
from ..storage.folder_lock import FolderInUseError

_EXACT = "wrap with GradNormModule(net, coupled='exact')"  # what a refusal says to people who write Python
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
    with addresses_noted():
        try:
            with raised():
                yield
        except KeyboardInterrupt:
            _say(_interrupted("interrupted", resume()))
            raise typer.Exit(INTERRUPTED) from None
        except TerminatedError as error:
            _say(_interrupted(str(error), resume()))
            raise typer.Exit(TERMINATED) from None
        except NonFiniteError as error:
            _say(f"{error}: training diverged. Try a smaller --lr or --alpha in another --out.")
            raise typer.Exit(1) from None
        except RefusedError as error:
            _say(str(error).replace("engm: ", "", 1).replace(_EXACT, "add --coupled exact"))
            raise typer.Exit(1) from None
        except (Exception, SystemExit) as error:  # a user's own code may say sys.exit()
            message = _explained(error, resume)
            if message is None:
                raise
            _say(message)
            raise typer.Exit(1) from None


def _explained(error: Exception | SystemExit, resume: Callable[[], str]) -> str | None:
    """What to say of a failure that a user can mend; ``None`` of others."""
    # By its name, because torch need not be there; the text is what torch says on a CPU.
    no_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if no_memory or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return _MEMORY
    own = failure_of_own_code(error)
    if own is not None:
        return "\n".join([own, *(f"once that is mended, {how}" for how in [resume()] if how)])
    return str(error) if isinstance(error, _EXPECTED) else None


def _interrupted(what: str, resume: str) -> str:
    return f"{what}; {resume}" if resume else what


def _say(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    Console(stderr=True, soft_wrap=True).print(f"[bold red]engm{where}:[/] {escape(message)}", highlight=False)
