"""The ``engm`` command, also as ``python -m engm.recipes``, which torchrun starts; Ctrl-C ends it from the first."""

import signal
import sys

from .failures import INTERRUPTED


def main() -> None:
    """Runs the command. It is imported in here, which takes a moment, so that Ctrl-C is met meanwhile as well."""
    try:
        from .cli import app

        app(prog_name="engm")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        # All that is left is the end of Python itself, which a second Ctrl-C may cut short without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
