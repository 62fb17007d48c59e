"""The first line of a training command: whether a run begins or goes on, where, and on which data."""

from __future__ import annotations

from difflib import get_close_matches

from ..config import RunConfig
from .contents import holds_run
from .files import LAST, RunFolder


def opening_line(folder: RunFolder, config: RunConfig) -> str:
    """What is about to happen in a folder; where a run begins, also which run beside it has nearly the same name.

    Args:
        folder: of the run.
        config: its settings, as :meth:`RunFolder.check_free_for` gives them.
    """
    over = folder.is_over(config)
    known = folder.config().data if over else config.data
    embedded = ", the digits that come with scikit-learn (--data names others)" if known == "digits" else ""
    data = f"{known}{embedded}"
    if over:
        return (
            f"The run in {folder.path} was finished before; nothing was done. It was trained on {data}, for "
            f"{config.epochs} epochs; --epochs with a larger number trains on."
        )
    if folder.exists and folder.store.names(LAST):
        return f"Going on with the run in {folder.path} on {data}{_longer(folder.config(), config)}."
    return f"Beginning a new run in {folder.path} on {data}.{_meant(folder)}"


def _longer(own: RunConfig, config: RunConfig) -> str:
    """What changes where a run is to have another length than it had, and what does not."""
    if config.epochs == own.epochs:
        return ""
    line = f", to {config.epochs} epochs in place of {own.epochs}"
    decays = ", ".join(map(str, config.decay_epochs or ()))
    kept = "stays as it was" if config.decay_epochs == own.decay_epochs else "changes"
    if config.schedule == "steps":
        return f"{line}; the learning rate {kept}, divided by 10 after epochs {decays} (--decay-epochs says otherwise)"
    planned = config.schedule_epochs or config.epochs
    return f"{line}; the learning rate ({config.schedule}) is as planned for {planned} epochs"


def _meant(folder: RunFolder) -> str:
    """Runs beside a new one with nearly its name, which a misspelt --out could have meant."""
    parent = folder.path.absolute().parent
    names = [entry.name for entry in parent.iterdir() if holds_run(entry)] if parent.is_dir() else []
    near = get_close_matches(folder.path.name, [name for name in names if name != folder.path.name], n=1, cutoff=0.8)
    # Folders that differ in digits alone are seeds and sizes of one family, and no misspelling.
    letters = [name for name in near if _letters(name) != _letters(folder.path.name)]
    return f" There is a run in {folder.path.parent / letters[0]}: was that one meant?" if letters else ""


def _letters(name: str) -> str:
    return "".join(character for character in name if not character.isdigit())
