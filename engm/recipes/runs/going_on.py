"""With which settings does a run go on? Its own, but for its length and for where its data lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..config import RunConfig, option
from ..data_names import names_place

# Settings of a run's length. What else hangs on the number of epochs stays as it was planned: see --schedule-epochs.
LENGTH = ("epochs", "schedule_epochs", "decay_epochs")
PLACES = ("data", "extra")  # settings that may say where images lie; whether these are the same, the images say


def of_the_same_run(
    own: RunConfig, config: RunConfig, path: Path, trained: Callable[[], tuple[int, int]], *, what: str = "run"
) -> RunConfig:
    """The resolved settings with which the run in ``path`` goes on.

    Args:
        own: the settings that the run has.
        config: those that it is asked to go on with. Where these have another number of epochs, and do not say for how
            many the schedule is made, the schedule stays the run's own.
        path: folder of the run, for messages.
        trained: gives the numbers of finished epochs and of those begun.
        what: what the path holds, for messages.

    Raises:
        ValueError: other settings (another path of the data is none), fewer epochs than were trained, or other
            learning rates in these.
    """
    longer = config.epochs != own.epochs
    if config.schedule_epochs is None:
        config = replace(config, schedule_epochs=own.schedule_epochs or (own.epochs if longer else None))
    config = config.resolved()
    differences = config.differences(own)
    may_change = {*(LENGTH if longer else ()), *moved(own, config)}
    refused = {name: pair for name, pair in differences.items() if name not in may_change}
    if refused:
        listed = ", ".join(f"{option(k)} {old} (now {new})" for k, (new, old) in refused.items())
        raise ValueError(
            f"{path} holds a {what} with other settings: {listed}. Choose another --out, or leave these settings out "
            "to go on with it."
        )
    if longer:
        finished, begun = trained()
        if config.epochs < finished:
            raise ValueError(
                f"--epochs {config.epochs}: the run in {path} has trained for {finished} epochs, and none is taken "
                "back. Choose more epochs, or another --out"
            )
        past, now = (_decays_before(begun, one) for one in (own, config))
        if past != now:
            raise ValueError(
                f"--decay-epochs {_listed(config)}: the run in {path} is in epoch {begun}, and its decays by then "
                f"({', '.join(map(str, past)) or 'none'}) cannot be changed any more"
            )
    return config


def moved(own: RunConfig, config: RunConfig) -> list[str]:
    """Those of :data:`PLACES` in which two resolved configurations name different paths of files or folders."""
    pairs = {name: (getattr(own, name), getattr(config, name)) for name in PLACES}
    return [name for name, (old, new) in pairs.items() if old and new and old != new and _are_places(old, new)]


def _are_places(*specs: str) -> bool:
    return all(map(names_place, specs))


def _decays_before(begun: int, config: RunConfig) -> list[int]:
    """The decays that the epochs which were begun, counted from 0, have seen."""
    return [epoch for epoch in config.resolved().decay_epochs or () if epoch < begun]


def _listed(config: RunConfig) -> str:
    return ",".join(map(str, config.decay_epochs or ()))
