"""Code of one's own by its address: ``package.module:name`` or ``file.py:name``, found, loaded and called."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from engm.checks import check_name

_ENGM = Path(__file__).parents[1]

SOURCES = ("torchvision", "timm", "hf")
"""What stands before a colon and is no module of one's own: packages whose things have names."""

_notes: list[dict[str, set[str]]] = []
"""Of every open :func:`addresses_noted` the addresses loaded, each with the files of its module and its thing."""

_ADDRESS = re.compile(r"(?P<place>.+):(?P<name>[A-Za-z_]\w*)")


def is_address(text: str) -> bool:
    """Whether a setting names code of one's own; ``torchvision:resnet18`` and the like do not.

    Raises:
        ValueError: it names a Python file, but nothing in it.
    """
    match = _ADDRESS.fullmatch(text.strip())
    if match is None:
        if text.strip().endswith(".py"):
            raise ValueError(f"{text} is a Python file: say which function or class in it, as {text}:NAME")
        return False
    place = match["place"]
    own = place.endswith(".py") or all(part.isidentifier() for part in place.split("."))
    return own and place.lower() not in SOURCES


def settled(text: str) -> str:
    """An address that is found again from another working directory; other texts are returned as they are."""
    if not is_address(text):
        return text
    place, _, name = text.strip().rpartition(":")
    return f"{Path(place).expanduser().absolute()}:{name}" if place.endswith(".py") else f"{place}:{name}"


def short_name(address: str) -> str:
    """``module.name``, for tables and names of folders."""
    place, _, name = address.strip().rpartition(":")
    return f"{Path(place).stem if place.endswith('.py') else place}.{name}"


def load(address: str, *, what: str, also: Iterable[str] = ()) -> Any:
    """What an address names; modules are looked for as ``python -m`` does, in the current directory too.

    Args:
        address: ``package.module:name``, or the path of a Python file and a name in it.
        what: what it should be, for the messages.
        also: words that the part before the colon could be a misspelling of, besides modules.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such module or name (says which are nearest), or the module cannot be imported.
    """
    place, _, name = address.strip().rpartition(":")
    module = _file(Path(place).expanduser(), what) if place.endswith(".py") else _module(place, what, also)
    if not hasattr(module, name):
        check_name(name, _defined(module), what=f"{what} in {place}")
    found = getattr(module, name)
    if _notes:
        _notes[-1][address.strip()] = {file for thing in (module, found) if (file := _file_of(thing)) is not None}
    return found


@contextmanager
def addresses_noted() -> Iterator[None]:
    """Put around a command's work, notes which code of the user's it loads, for :func:`failure_of_own_code`."""
    _notes.append({})
    try:
        yield
    finally:
        _notes.pop()


def code_identity(address: str, *, what: str) -> str:
    """Sixteen digits that differ if the file does in which an address lies; of its imports nothing is known.

    Args:
        address: of something that :func:`load` finds.
        what: what it should be, for the messages.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`.
    """
    load(address, what=what)
    place, _, _ = address.strip().rpartition(":")
    file = Path(place).expanduser() if place.endswith(".py") else Path(inspect.getfile(sys.modules[place]))
    return sha256(file.read_bytes()).hexdigest()[:16]


def call(function: Callable[..., Any], address: str, must: Mapping[str, Any], may: Mapping[str, Any]) -> Any:
    """Calls code of one's own with keywords.

    Args:
        function: what the address names.
        address: for the messages.
        must: keywords that it is always given.
        may: keywords that it is given if it has parameters of these names.

    Raises:
        ValueError: it cannot be called so (the message says how it is called), or it fails.
    """
    if not callable(function):
        raise ValueError(f"{address} is a {type(function).__name__}; expected a function or a class")
    parameters = _parameters(function)
    takes_any = parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = set() if parameters is None else {n for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, _BOTH)}
    missing = [name for name in must if name not in named and not takes_any]
    given = {**must, **{name: value for name, value in may.items() if name in named}}
    unknown = [
        name
        for name, p in (parameters or {}).items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name not in given
    ]
    if missing or unknown:
        lacking = f"it has no parameter {', '.join(missing)}" if missing else f"nobody gives it {', '.join(unknown)}"
        asked = f", and with {', '.join(f'{name}=' for name in may)} where it has these parameters" if may else ""
        shown = ", ".join(f"{name}=" for name in must)
        raise ValueError(
            f"{address} is called with {shown or 'no argument'}{asked}; {lacking}. Give what is missing a parameter, "
            "or a default"
        )
    with explained(address):
        return function(**given)


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Put around a call of what an address names, says of a failure that it is there, and in which line.

    Raises:
        ValueError: any other exception than an interruption.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(_failed(address, error)) from error


def failure_of_own_code(error: BaseException) -> str | None:
    """What to say of an exception that was raised in code that an address names, or in a library that it calls.

    Args:
        error: as it was caught, with its traceback.

    Returns:
        The address, the exception and the lines of the user's own code that led to it. ``None`` where the exception
        comes from elsewhere, is a fault of this package, which the user's code called (all but a ``ValueError``), or
        nothing was loaded since :func:`addresses_noted`.
    """
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [code for code in codes if _is_own(code.co_filename)]
    if not own or not (_notes and _notes[-1]):
        return None
    below = codes[len(codes) - codes[::-1].index(own[-1]) :]
    if any(_is_ours(code.co_filename) for code in below) and not isinstance(error, ValueError):
        return None
    return _failed(_address_of(own), error)


def _address_of(own: list[CodeType]) -> str:
    """The address whose code was called, the outermost first; several where these cannot be told apart."""
    loaded = _notes[-1]
    of_file = [[a for a, files in loaded.items() if code.co_filename in files] for code in own]
    for code, addresses in zip(own, of_file, strict=True):
        named = [a for a in addresses if a.rpartition(":")[2] == code.co_qualname.partition(".")[0]]
        if named:
            return named[0]
    return " or ".join(next(filter(None, of_file), list(loaded)))


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of a name."""
    return name in (_parameters(function) or {})


_BOTH = inspect.Parameter.POSITIONAL_OR_KEYWORD


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a function or class; None where Python does not know them."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def _defined(module: ModuleType) -> list[str]:
    """What a module defines itself, by its public names."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and not ((inspect.isclass(value) or inspect.isroutine(value)) and value.__module__ != module.__name__)
    ]


def _module(name: str, what: str, also: Iterable[str]) -> ModuleType:
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.insert(0, here)
    importlib.invalidate_caches()  # the module may be younger than what the import system remembers of its folder
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _not_imported(name, error) from error
        parent, _, lost = error.name.rpartition(".")
        beside = getattr(sys.modules.get(parent), "__path__", None) if parent else [here]
        known = [module.name for module in pkgutil.iter_modules(beside)] if beside is not None else []
        try:
            check_name(lost, [*known, *also], what=f"module of the {what} {name!r}")
        except ValueError as unknown:
            raise ValueError(
                f"{unknown}. It was looked for in {parent or f'{here}, and among what is installed'}"
            ) from None
        raise _not_imported(name, error) from error
    except Exception as error:
        raise _not_imported(name, error) from error


def _file(path: Path, what: str) -> ModuleType:
    path = path.absolute()
    if not path.is_file():
        near = [entry.name for entry in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"no file {path} with the {what}; in that folder: {', '.join(sorted(near)) or 'none'}")
    name = f"engm_own_{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # so that the file can import its neighbours
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it is executed, as the import system does: data classes look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _not_imported(str(path), error) from error
    return module


def _not_imported(name: str, error: Exception) -> ValueError:
    """What to say of a module that fails while it is imported: where, and why."""
    return ValueError(f"{name} cannot be imported: {type(error).__name__}: {error}{_where(error)}")


def _failed(address: str, error: BaseException) -> str:
    """What failed, why and where; where the failing line was called from the user's own code, also from which lines."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
    calls = "".join(traceback.format_list(lines)).rstrip()
    return f"{address} failed: {type(error).__name__}: {error}{_where(error)}" + (f"\n{calls}" if lines else "")


def _where(error: BaseException) -> str:
    """The line in which an exception was raised: the last one of the user's own code, where some of it ran."""
    if isinstance(error, SyntaxError):
        return f", at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_own(frame.filename)]
    return "".join(f", at {frame.filename}:{frame.lineno}" for frame in (own or frames)[-1:])


def _file_of(thing: Any) -> str | None:
    """The file of a module, a class or a function that is none of this package's."""
    try:
        file = inspect.getfile(thing)
    except TypeError:  # some other object, or one that is compiled
        return None
    return None if _is_ours(file) else file


def _is_own(file: str) -> bool:
    """Whether a file is the user's: one that an address was found in, or none of Python, a library or this package."""
    return any(file in files for loaded in _notes for files in loaded.values()) or not _installed(file)


def _installed(file: str) -> bool:
    """Whether a file is Python's, an installed library's or this package's."""
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return file.startswith("<") or _is_ours(file) or any(Path(file).is_relative_to(folder) for folder in folders)


def _is_ours(file: str) -> bool:
    """Whether a file is of this package."""
    return Path(file).is_relative_to(_ENGM)
