"""How can work end that was begun well? Errors that commands explain, whichever room of the recipes raises them."""


class OtherProcessError(RuntimeError):
    """Something failed in another process of the same run."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file and the reason."""
