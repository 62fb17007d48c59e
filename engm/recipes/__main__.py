"""``python -m engm.recipes``, which is what torchrun starts: the ``engm`` command."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="engm")
