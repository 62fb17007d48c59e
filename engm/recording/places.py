"""Where the code of a step finds what it reads: which functions and objects are followed, and what is in them.

A place is what something is read from: a variable of a function, an attribute, an element of a list. A thing is a
function, class, module or object that has places. What a thing holds counts if code that is run names it.
"""

from __future__ import annotations

import gc
import io
import os
import random
import sys
import threading
import weakref
from argparse import Namespace
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import is_dataclass
from enum import Enum
from functools import cache, cached_property, partial, partialmethod
from operator import attrgetter
from types import (
    BuiltinMethodType,
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.held import MISSING
from ..module import GradNormModule
from ..optim import ExampleOptimizer
from ..torch_internals import hooks_of, own_buffers, own_children, own_parameters
from .refusals import of_a_library

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format, Enum)
Place = tuple[Any, Any]  # what is read from, and the key, number or name there
OF_A_MODULE = frozenset(nn.Module().__dict__)  # what torch itself keeps in every module
MAKING = frozenset(["__init__", "__new__", "__post_init__", "__init_subclass__", "__set_name__", "__class_getitem__"])
OF_A_WRAPPER = ("batch_norm", "strict", "coupled", "forward")  # what counts of it, where it has that itself
OWN = __name__.rpartition(".")[0]  # recorded steps are no part of what they do
OF_AN_OPTIMIZER = ("param_groups", "state")  # what a step of another optimizer reads, where code calls one
ALL_BY_NAME = frozenset(["vars", "__dict__", "asdict", "astuple"])  # by which code reads all options, naming none
WHOLE = (UserDict, UserList, ChainMap)  # whose code is the standard library's, and whose data are attributes
CONTAINERS = (list, tuple, dict, deque, set, frozenset)
# Methods that torch calls by itself, of modules and of functions of autograd.
CALLED_BY_TORCH = frozenset(["forward", "backward", "setup_context", "jvp", "vmap"])


def at(place: Place) -> Any:
    """What is in a place; MISSING where there is nothing."""
    holder, name = place
    if isinstance(holder, dict):
        return holder.get(name, MISSING)
    if isinstance(holder, CellType):
        return _content(holder)
    if isinstance(holder, list | tuple | deque):
        return holder[name] if name < len(holder) else MISSING
    if isinstance(holder, ContextVar):
        return holder.get(MISSING)
    if isinstance(holder, Mapping):
        return holder.get(name, MISSING)
    return getattr(holder, name, MISSING)  # a class, or an object with slots


def put_at(place: Place, value: Any) -> None:
    """Put a value back where it was."""
    holder, name = place
    if isinstance(holder, CellType):
        holder.cell_contents = value
    elif isinstance(holder, ContextVar):
        holder.set(value)
    elif isinstance(holder, list | deque):
        if name < len(holder):
            holder[name] = value
    elif isinstance(holder, Mapping):
        if value is MISSING:
            holder.pop(name, None)  # type: ignore[attr-defined]
        else:
            holder[name] = value  # type: ignore[index]
    elif value is MISSING:
        delattr(holder, name)
    elif not isinstance(holder, tuple):
        setattr(holder, name, value)


def said(place: Place) -> str:
    """The name of a place."""
    return f"the state of {type(place[1]).__name__}" if isinstance(place[1], Tensor) else str(place[1])


def is_followed(thing: Any) -> bool:
    """Whether what a thing holds may matter to a step: not if it is a plain value, a tensor, or code of a library.

    Of libraries' objects what the user's code names is looked at, and all that torch's and ours hold.
    """
    if isinstance(thing, (*PLAIN, Tensor)) or thing is MISSING or type(thing).__module__.startswith(OWN):
        return False
    if isinstance(thing, FunctionType):
        return _is_users(thing) or thing.__closure__ is not None
    if isinstance(thing, ModuleType):
        return _is_users_module(thing)
    if isinstance(thing, type):
        return _is_users_class(thing)
    if isinstance(thing, CONTAINERS):
        return not _is_plain(thing)
    if isinstance(thing, BuiltinMethodType):  # of an object: dictionary.get
        holder = thing.__self__
        return isinstance(holder, CONTAINERS) or (not isinstance(holder, ModuleType | type) and is_followed(holder))
    if isinstance(thing, MethodType | partial | ContextVar | Mapping | weakref.ref | attrgetter):
        return True
    if _is_array_of_objects(thing):
        return True
    kind: Any = type(thing)
    return has_attributes(kind)


def gives_another_each_time(value: Any) -> bool:
    """Whether code that asks a value for something gets something else each time, and changes the value by that."""
    if isinstance(value, random.Random) or type(value).__module__.startswith("numpy.random"):
        return True
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase)


@cache
def has_attributes(kind: type) -> bool:
    """Whether objects of a type have attributes that code in Python has given them."""
    if kind.__dictoffset__ != 0 or issubclass(kind, threading.local):
        return not issubclass(kind, type | ModuleType)
    return any(isinstance(found, MemberDescriptorType) for one in kind.__mro__ for found in _slots(one).values())


def _slots(kind: type) -> dict[str, Any]:
    """The slots that a class in Python has."""
    named = vars(kind).get("__slots__", ())
    names = (named,) if isinstance(named, str) else tuple(named)
    return {name: vars(kind)[name] for name in names if name in vars(kind)}


def _is_users(function: FunctionType) -> bool:
    return not of_a_library(function.__code__.co_filename)


def _is_users_module(module: ModuleType) -> bool:
    name = getattr(module, "__name__", "")
    return name == "__main__" or (not _is_standard(name) and not of_a_library(_file_of(module)))


@cache
def _is_users_class(kind: type) -> bool:
    if issubclass(kind, Enum) or _is_standard(kind.__module__):
        return False
    return not of_a_library(_file_of(sys.modules.get(kind.__module__)))


def _is_standard(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names and name != "__main__"


def _file_of(module: ModuleType | None) -> str:
    folders = [os.path.join(folder, "") for folder in getattr(module, "__path__", ())]
    return str(getattr(module, "__file__", None) or (folders or [""])[0])


def _is_ours(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] in ("engm", "torch")


def _is_array_of_objects(thing: Any) -> bool:
    return type(thing).__module__ == "numpy" and getattr(getattr(thing, "dtype", None), "hasobject", False)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict) and not all(map(_is_plain, value.values())):
        return False
    return all(map(_is_plain, value)) if isinstance(value, CONTAINERS) else isinstance(value, PLAIN)


def cached_by(thing: Any) -> list[Tensor]:
    """The tensors that ``functools.lru_cache`` keeps for a function, which are the same at every step."""
    if not isinstance(thing, type(cache(len))):
        return []
    found: list[Any] = [thing]
    known = {id(thing)}
    for one in found:  # which grows: dictionaries and links of the cache's list
        inside = isinstance(one, dict | tuple | list) or type(one).__module__ == "functools"
        new = [held for held in gc.get_referents(one) if id(held) not in known] if inside else []
        known.update(map(id, new))
        found += new
    return [held for held in found if isinstance(held, Tensor)]


def is_function_of_user(thing: Any) -> bool:
    """Whether a thing is a function whose code is followed."""
    return isinstance(thing, FunctionType) and _is_users(thing)


def names_read_by(thing: Any) -> Iterator[str]:
    """The names of variables and attributes that a function of the user reads, and words in it that may be such."""
    if isinstance(thing, FunctionType) and _is_users(thing):
        yield from _names_in(thing.__code__)
    elif isinstance(thing, attrgetter):
        paths: Any = thing.__reduce__()[1]
        yield from ".".join(paths).split(".")


@cache
def _names_in(code: CodeType) -> frozenset[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_in(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            names.add(constant)
    return frozenset(names)


def names_of_options(attributes: Mapping[str, Any]) -> list[str]:
    """The attributes of a module that are not torch's, and the module's mode."""
    return [name for name in attributes if name == "training" or name not in OF_A_MODULE]


def places_in(thing: Any, names: Collection[str]) -> tuple[list[dict[Any, Any]], list[Place]]:
    """Where a thing holds what code with these names in it may read, behind dictionaries that may come to hold it."""
    if isinstance(thing, FunctionType):
        return _places_in_function(thing, names)
    if isinstance(thing, partial):
        return [thing.keywords], [*_elements(thing.args), *[(thing.keywords, key) for key in thing.keywords]]
    if isinstance(thing, ContextVar):
        return [], [(thing, thing.name)]
    if isinstance(thing, BuiltinMethodType):
        return places_in(thing.__self__, names)
    if isinstance(thing, MappingProxyType):  # a view of a dictionary, or of another mapping
        found_in = [places_in(held, names) for held in gc.get_referents(thing)]
        return [one for dicts, _ in found_in for one in dicts], [place for _, places in found_in for place in places]
    if isinstance(thing, ModuleType):
        return [vars(thing)], [(vars(thing), name) for name in names if name in vars(thing)]
    if isinstance(thing, type):
        return [], [(thing, name) for name in _data_of_class(thing, names)]
    dicts, found = _attributes(thing, names)
    if isinstance(thing, list | tuple | deque):
        found += _elements(thing)
    elif isinstance(thing, dict):
        dicts, found = [*dicts, thing], [*found, *[(thing, key) for key in thing]]
    elif isinstance(thing, Mapping):
        found += [(thing, key) for key in thing if key in names]
    return dicts, found


def _places_in_function(function: FunctionType, names: Collection[str]) -> tuple[list[dict[Any, Any]], list[Place]]:
    closed = zip(function.__closure__ or (), function.__code__.co_freevars, strict=True)
    found: list[Place] = [(cell, name) for cell, name in closed if name != "__class__"]
    if not _is_users(function):  # a decorator, say; what is given to it is the user's
        return [], found
    known, by_name = function.__globals__, function.__kwdefaults__
    found += [(known, name) for name in _names_in(function.__code__) if name in known]
    found += [*_elements(function.__defaults__ or ()), *[(by_name, name) for name in by_name or ()]]
    found += [(vars(function), name) for name in vars(function) if name in names]
    return [known, vars(function), *([by_name] if by_name else [])], found


def _elements(sequence: Any) -> list[Place]:
    return [(sequence, number) for number in range(len(sequence))]


def _attributes(thing: Any, names: Collection[str]) -> tuple[list[dict[Any, Any]], list[Place]]:
    """The places of an object's attributes, its own and those of its class."""
    kind = type(thing)
    attributes = getattr(thing, "__dict__", None)
    of_class = _data_of_class(kind, names)
    found: list[Place] = [(kind, name) for name in of_class]
    found += [(thing, name) for one in kind.__mro__ for name in _slots(one) if name in names]
    if not isinstance(attributes, dict):
        return [], found
    # Ours note what they did in attributes of their own.
    dicts = [] if isinstance(thing, ExampleOptimizer) and _is_ours(thing) else [attributes]
    if isinstance(thing, nn.Module):
        held: list[Any] = [own_parameters(thing), own_buffers(thing), own_children(thing), *hooks_of(thing)]
        # Those of a scripted module are no dictionaries, but its attributes as well.
        found += [(kind_of if isinstance(kind_of, dict) else thing, n) for kind_of in held for n, _ in kind_of.items()]
        dicts += [kind_of for kind_of in held if isinstance(kind_of, dict)]
        # What else a wrapper holds are counters and the like; its mode is its network's.
        options = OF_A_WRAPPER if isinstance(thing, GradNormModule) else names_of_options(attributes)
        read = [name for name in options if name in attributes]
    else:
        read = _read_of(thing, attributes, names)
    # What the class has may come to be an attribute of the object's own.
    return dicts, found + [(attributes, name) for name in {*read, *of_class}]


def _read_of(thing: Any, attributes: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """The attributes of an object, no module, that count."""
    kind = type(thing)
    if isinstance(thing, ExampleOptimizer):
        # Of those that are left out the program has the tensors and numbers as inputs; a scheduler hides step.
        others = (*thing.not_for_programs, *thing.numbers(), "optimizer", "model", "step")
        return [name for name, value in attributes.items() if name not in others and not isinstance(value, Tensor)]
    if isinstance(thing, torch.optim.Optimizer):
        return [name for name in attributes if name in names or ("step" in names and name in OF_AN_OPTIMIZER)]
    # Code of libraries is not followed, so that nobody knows what an object's answers are made of.
    whole = _is_ours(thing) or isinstance(thing, WHOLE) or hasattr(kind, "__getattr__")
    options = isinstance(thing, Namespace | SimpleNamespace) or is_dataclass(thing)
    whole = whole or (options and not ALL_BY_NAME.isdisjoint(names))
    return [name for name, value in attributes.items() if whole or name in names or isinstance(value, Tensor)]


def _data_of_class(kind: type, names: Collection[str]) -> list[str]:
    """What a class has that code with these names may read or run: values and functions, but for what Python makes."""
    found = [name for name, value in _of_class(kind, names) if not hasattr(type(value), "__get__")]
    return found + [name for name, value in _of_class(kind, names) if isinstance(value, FunctionType | staticmethod)]


def _of_class(kind: type, names: Collection[str]) -> list[tuple[str, Any]]:
    """What the classes of the user that a class is made of define for code with these names."""
    return [
        (name, value)
        for one in kind.__mro__
        if _is_users_class(one)
        for name, value in vars(one).items()
        if name in names
        or name in CALLED_BY_TORCH
        or (_is_special(name) and isinstance(value, FunctionType))
        or issubclass(kind, ExampleOptimizer)  # whose methods we call
    ]


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__") and name not in MAKING


def members(thing: Any, names: Collection[str]) -> list[Any]:
    """What belongs to a thing as long as that lives, but for its places."""
    if isinstance(thing, FunctionType):
        return _modules_of(thing) if _is_users(thing) else []
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, BuiltinMethodType):
        return [thing.__self__]
    if isinstance(thing, set | frozenset):
        return list(thing)
    if isinstance(thing, partial):
        return [thing.func]
    if isinstance(thing, weakref.ref):
        return [thing()]
    if _is_array_of_objects(thing):
        return list(thing.flat)
    kind = thing if isinstance(thing, type) else type(thing)
    found = [hook for hooks in hooks_of(thing) for hook in hooks.values()] if isinstance(thing, nn.Module) else []
    if isinstance(thing, nn.Module):
        found.append(getattr(kind, "forward", None))  # of a class of torch's own too, which somebody may have patched
    if isinstance(thing, GradNormModule):
        found.append(thing.unwrap())
    if isinstance(thing, dict):
        found += [key for key in thing if not isinstance(key, PLAIN)]
    if not isinstance(thing, (*CONTAINERS, ModuleType)):
        found.append(getattr(thing, "__dict__", {}).get("__wrapped__"))  # by a decorator
    if isinstance(thing, type):
        found.append(type(thing))
    if isinstance(thing, type) and not issubclass(thing, nn.Module):  # code that names it may make one
        found += [
            value for one in kind.__mro__ if _is_users_class(one) for n, value in vars(one).items() if n in MAKING
        ]
    for _, value in _of_class(kind, names):
        found += _functions_in(value)
    return found


def _functions_in(value: Any) -> list[Any]:
    """The functions that an attribute of a class calls."""
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, staticmethod | classmethod):
        return [value.__func__]
    if isinstance(value, cached_property | partialmethod):
        return [value.func]
    return [] if isinstance(value, MemberDescriptorType | GetSetDescriptorType) else [value]


def _modules_of(function: FunctionType) -> list[Any]:
    """What a function imports when it runs, and the variables of the process where it reads these."""
    names = _names_in(function.__code__)
    package = function.__globals__.get("__package__") or ""
    modules = [sys.modules.get(one) for name in names for one in (name, f"{package}.{name}")]
    return [*modules, *[os.environ for name in ("environ", "getenv") if name in names]]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return MISSING
