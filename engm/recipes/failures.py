"""How can work end that was begun well? Errors that commands explain, whichever room of the recipes raises them."""

INTERRUPTED = 130  # the exit status that shells report for Ctrl-C


class OtherProcessError(RuntimeError):
    """Something failed in another process of the same run."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file and the reason."""
