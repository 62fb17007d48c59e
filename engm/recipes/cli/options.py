"""The settings of a run as options of a command, made from the fields of :class:`RunConfig`: each is written once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from engm.names import BETAS

from ..config import RunConfig, option, parse_number
from ..config_files import from_values, is_resolved, read_toml, value_type

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE.toml", help="Settings; options given here override them.")
]


def with_settings(command: Callable[..., None], *, leave_out: tuple[str, ...] = ()) -> Callable[..., None]:
    """A command that takes every setting as an option beside its own parameters.

    Args:
        command: takes its own parameters by keyword, and the settings that were given as ``settings: dict``.
        leave_out: settings that the command decides itself.
    """
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "settings"]
    hints = inspect.get_annotations(command, eval_str=True)
    names = [f.name for f in fields(RunConfig) if f.name not in leave_out]

    def wrapper(**given: Any) -> None:
        settings = {name: given.pop(name) for name in names}
        command(**given, settings={name: value for name, value in settings.items() if value is not None})

    options = [_option(f) for f in fields(RunConfig) if f.name in names]
    parameters = [*[p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY) for p in own], *options]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapper.__doc__ = command.__doc__
    wrapper.__name__ = command.__name__
    return wrapper


def _option(f: Any) -> inspect.Parameter:
    """A setting as an option; ``None`` means that it was not given, which tells a choice from a default."""
    kind, _ = value_type(f.name)
    default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
    details: dict[str, Any] = {
        "help": f.metadata["help"],
        "rich_help_panel": f.metadata["section"],
        "show_default": str(default) if default is not None else False,
    }
    annotation: Any
    if kind is bool:
        annotation = Annotated[bool | None, typer.Option(f"{option(f.name)}/--no-{option(f.name)[2:]}", **details)]
    elif kind is float or get_args(kind):
        metavar = "NUMBER" if kind is float else "A,B,..."
        annotation = Annotated[str | None, typer.Option(option(f.name), metavar=metavar, **details)]
    else:
        annotation = Annotated[kind | None, typer.Option(option(f.name), **details)]
    return inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


DECIDED = (
    "optimizer",
    "seed",
    "alpha",
    "keep_epochs",
    "time_limit",
)  # what an analysis of engm reproduce decides itself
FETCHED = ("cifar10", "cifar100", "svhn")  # what --download can fetch
# When a setting that has a meaning only beside others has it, and how to say so.
_APPLIES: dict[str, tuple[Callable[[RunConfig], bool], str]] = {
    "beta": (lambda c: c.objective in BETAS, f"--objective {', '.join(BETAS)}"),
    "patience": (lambda c: c.objective == "fat", "--objective fat"),
    "gap_first": (lambda c: c.objective == "ates", "--objective ates"),
    "gap_last": (lambda c: c.objective == "ates", "--objective ates"),
    "gap_epochs": (lambda c: c.objective == "ates", "--objective ates"),
    "bs_gamma": (lambda c: c.objective == "backward-smoothing", "--objective backward-smoothing"),
    "bs_steps": (lambda c: c.objective == "backward-smoothing", "--objective backward-smoothing"),
    "attack_steps": (lambda c: c.objective != "backward-smoothing", "other objectives, and --bs-steps is its own"),
    "guide": (lambda c: c.objective == "lbgat", "--objective lbgat"),
    "sat_momentum": (lambda c: c.objective == "self-adaptive", "--objective self-adaptive"),
    "sat_start": (
        lambda c: c.objective == "self-adaptive" and (c.sat_start or 1) <= c.epochs,
        "--objective self-adaptive, and for one of its epochs",
    ),
    "awp_gamma": (lambda c: c.awp, "--awp"),
    "extra_fraction": (lambda c: c.extra is not None, "--extra"),
    "swa_start": (lambda c: c.swa_start is None or c.swa_start <= c.epochs, "an epoch of the run's"),
    "init_strict": (lambda c: c.init is not None, "--init"),
    "decay_epochs": (lambda c: c.schedule == "steps", "--schedule steps"),
    "schedule_epochs": (
        lambda c: c.schedule != "steps" or c.decay_epochs is None or c.objective in ("fat", "ates", "self-adaptive"),
        "another --schedule than steps, for which --decay-epochs says it all",
    ),
    "awp_warmup": (lambda c: c.awp and c.awp_warmup < c.epochs, "--awp, and for fewer epochs than --epochs"),
    "eps_warmup": (lambda c: c.eps_warmup <= c.epochs, "at most as many epochs as --epochs"),
    "validation_examples": (lambda c: c.data != "digits", "other data than the digits, whose split is given"),
    "download": (
        lambda c: not c.download or c.data in FETCHED or ":" in c.data,
        f"--data {', '.join(FETCHED)}, data of other packages and your own",
    ),
}
_OPTIMIZERS: dict[str, tuple[Callable[[RunConfig], bool], str]] = {
    "alpha": (lambda c: c.optimizer in ("engm", "a-engm", "n-engm", "f-engm"), "ENGM and its relatives"),
    "clip_fraction": (lambda c: c.alpha == "auto", "--alpha auto"),
    "tau": (lambda c: c.optimizer == "a-engm", "--optimizer a-engm"),
    "beta_gamma": (lambda c: c.optimizer == "a-engm", "--optimizer a-engm"),
    "max_norm": (lambda c: c.optimizer == "mgnc", "--optimizer mgnc"),
}


def go_on(short: str = "") -> str:
    """How to go on after an interruption: by the same command, or by a shorter one where there is one."""
    return f"the same command{short and f', or {short},'} goes on where it was left"


def config_from(
    settings: dict[str, Any],
    file: Path | None,
    *,
    own: RunConfig | None = None,
    compared: bool = False,
    trained: bool = False,
) -> RunConfig:
    """The configuration that a command line describes: the file's settings, overridden by the options given.

    Args:
        settings: the options that were given.
        file: a TOML file.
        own: the settings that stand in the place of a file where none is given, of what goes on.
        compared: the options are for several optimizers, of which each takes what is its own.
        trained: whether something was trained with these settings. Before that, those that nobody chose are worked out
            of the others anew where an option is given.

    Raises:
        FileNotFoundError, ValueError: as :func:`engm.recipes.config_files.from_values`; or an option would change
            nothing.
    """
    base = own.as_dict() if own is not None and file is None else _of_file(file)
    typed = {name: _typed(name, value) for name, value in settings.items()}
    config = from_values(base, source=str(file))
    if settings and not trained and (is_resolved(file) if file is not None else own is not None):
        config = from_values(config.chosen(), source=str(file))
    chosen = from_values({**config.as_dict(), **typed}, source="the command line")
    rules = _APPLIES if compared else {**_APPLIES, **_OPTIMIZERS}
    for name, (applies, where) in rules.items():
        if name in settings and not applies(chosen):
            raise ValueError(f"{option(name)} is for {where}; as it is it would change nothing")
    _warn_of_decays(chosen)
    return chosen


def _warn_of_decays(config: RunConfig) -> None:
    """Warns of chosen decays that come too late for the run; one that is made longer later may still see them."""
    decays = config.decay_epochs or ()
    late = [str(epoch) for epoch in decays if epoch >= config.epochs]
    if not late or decays == replace(config, decay_epochs=None).resolved().decay_epochs:
        return
    what = "the learning rate never falls in this run" if len(late) == len(decays) else "that is too late for it"
    warnings.warn(
        f"--decay-epochs {','.join(map(str, decays))}: a run of {config.epochs} epochs has no decay after epoch "
        f"{' and '.join(late)}; {what}, unless it is made longer",
        stacklevel=2,
    )


def chosen_settings(settings: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """Only what a file and the options name, as :class:`RunConfig` takes it.

    Raises:
        FileNotFoundError, ValueError: as :func:`engm.recipes.config_files.from_values`.
    """
    given = {**_of_file(file), **{name: _typed(name, value) for name, value in settings.items()}}
    decided = sorted(given.keys() & set(DECIDED))
    if decided:
        raise ValueError(f"{file} has {', '.join(decided)}, which an analysis decides itself: leave them out")
    checked = from_values(given, source="the command line" if file is None else f"{file} or the command line")
    return {name: getattr(checked, name) for name in given}


def _of_file(file: Path | None) -> dict[str, Any]:
    """What a TOML file names, by the settings' own names."""
    return {} if file is None else {k.replace("-", "_"): v for k, v in read_toml(file).items()}


def _typed(name: str, value: Any) -> Any:
    """An option's text as the setting's type."""
    kind, _ = value_type(name)
    if kind is float:
        try:
            return parse_number(value)
        except ValueError as error:
            raise ValueError(f"{option(name)}: {error}") from None
    if get_args(kind):
        parts = [part.strip() for part in value.split(",") if part.strip() and part.strip() != "none"]
        try:
            return [get_args(kind)[0](part) for part in parts]
        except ValueError:
            raise ValueError(f"{option(name)}: expected numbers with commas between them, got {value!r}") from None
    return value


def seeds_from(text: str) -> list[int]:
    """The seeds that ``--seeds`` means: how many, or which.

    Raises:
        ValueError: neither.
    """
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or (numbers == [0] and "," not in text):
        raise ValueError(f"--seeds: expected how many (at least 1), or which with commas between them, got {text!r}")
    return list(range(numbers[0])) if "," not in text else numbers
