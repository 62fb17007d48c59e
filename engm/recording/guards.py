"""What a recorded program holds for: everything that a step reads besides the numbers in tensors.

Two steps with equal keys run the same operators: sizes, types and devices of the batch, what the network consists of,
its modes and options, the optimizer's options, the numbers that the loss function closes over, and torch's switches.
"""

from __future__ import annotations

import weakref
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from datetime import date, time, timedelta
from functools import cache
from itertools import chain, count
from numbers import Number
from operator import attrgetter, is_
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .._C import same_items, same_types
from ..capture.held import ANY_LENGTH, MISSING, Held
from ..capture.layers import named_modules
from ..module import GradNormModule
from ..optim import ExampleOptimizer
from ..torch_internals import hooks_of, hooks_of_all_modules, modes_on, own_buffers, own_children, own_parameters
from .places import (
    CONTAINERS,
    PLAIN,
    Place,
    at,
    cached_by,
    gives_another_each_time,
    is_followed,
    is_function_of_user,
    members,
    names_of_options,
    names_read_by,
    places_in,
    said,
)

FIXED: tuple[Any, ...] = (None, type, frozenset)  # ways of freezing values that cannot be changed from within
MOST_STATES = 1000  # that are remembered
_MADE_OF = attrgetter("__code__", "__defaults__", "__kwdefaults__")  # what may be put into a function
CALLABLE = (FunctionType, BuiltinFunctionType, MethodType)  # whose types nobody changes
_FORWARD = attrgetter("forward")


def of_leaf(leaf: Any) -> Hashable:
    """What a program depends on of one of a step's arguments."""
    if isinstance(leaf, Tensor):
        layout = leaf.stride() if leaf.layout == torch.strided else leaf.layout
        bits = leaf.is_conj(), leaf.is_neg()
        own = _frozen(vars(leaf)) if vars(leaf) else ()
        return type(leaf), tuple(leaf.shape), layout, leaf.dtype, leaf.device, leaf.requires_grad, bits, own
    return type(leaf), _frozen(leaf)


class Numbers:
    """A number for every state of things: the same one whenever the state is the same."""

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}
        self._given = count()

    def of(self, state: Hashable) -> int:
        """The number of a state; states that were met long ago may get another one."""
        if state not in self._known:
            if len(self._known) >= MOST_STATES:
                self._known.clear()
            self._known[state] = next(self._given)
        return self._known[state]


class OfNetwork:
    """What a program depends on of the network, as a number: the same one as long as, and whenever, it is the same.

    Args:
        model: the wrapper.
    """

    def __init__(self, model: GradNormModule) -> None:
        self._model = model
        self._modules: list[nn.Module] = []
        self._held: Held | None = None
        self._inside: list[tuple[Any, Hashable]] = []  # values that can be changed from within, and what is in them
        self._number = 0
        self._numbers = Numbers()

    @property
    def modules(self) -> list[nn.Module]:
        """The modules of the network; the same list as long as they are the same."""
        return self._modules

    def number(self) -> int:
        """The number of the network as it is now."""
        held = self._held
        if held is None or not held.same() or any(_frozen(value) != inside for value, inside in self._inside):
            self._look()
        return self._number

    def _look(self) -> None:
        """Look at everything."""
        modules = [module for _, module in named_modules(self._model.unwrap())]
        if modules != self._modules:
            self._modules = modules
        state: list[Any] = []
        self._inside = []
        whole: list[Any] = []
        parts: list[tuple[dict[str, Any], int, tuple[str, ...]]] = []
        tensors: list[Tensor] = []
        for module in modules:
            attributes = vars(module)
            names = names_of_options(attributes)
            parts.append((attributes, len(attributes), tuple(names)))
            state += (id(module), type(module), len(attributes))
            for name in names:
                value = attributes[name]
                inside = _frozen(value)
                state += (name, type(value), inside)
                if not _is_fixed(value):
                    self._inside.append((value, inside))
            of_module: list[Any] = [own_children(module), own_parameters(module), own_buffers(module)]
            of_module += hooks_of(module)
            whole += of_module
            for found in of_module:
                state.append(len(found))
                state += [(name, id(value)) for name, value in found.items()]
            tensors += [p for p in own_parameters(module).values() if p is not None]
            tensors += [buffer for buffer in own_buffers(module).values() if buffer is not None]
        self._held = Held(modules, whole, parts, tensors)
        self._number = self._numbers.of((*state, self._held.facts))


class _Who:
    """Who an object is; equal to that of the same object alone, which is not held where that can be helped."""

    __slots__ = ("_hash", "_reference", "_thing")

    def __init__(self, thing: Any) -> None:
        self._hash = id(thing)
        try:
            self._reference: Callable[[], Any] | None = weakref.ref(thing)
        except TypeError:
            self._reference = None
            self._thing = thing

    def _now(self) -> Any:
        """The object; once it is gone, what is nobody else's."""
        if self._reference is None:
            return self._thing
        thing = self._reference()
        return self if thing is None else thing

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Who) and self._hash == other._hash and self._now() is other._now()


def _frozen_part(part: Any) -> Any:
    """What a program depends on of a value within another: also who an object is, but for tensors."""
    kind: Any = type(part)
    freeze = _freezing(kind)
    if freeze is type and not isinstance(part, Tensor):
        return _Who(part)
    return part if freeze is None else freeze(part)


def _frozen_number(value: Any) -> Any:
    """A number, or what it is called where equal ones differ (``0.0`` and ``-0.0``) or none equals itself."""
    return value if value and value == value else repr(value)


def _frozen(value: Any) -> Any:
    """What a program depends on of any value, as it is now: of tensors and other objects nothing but what they are."""
    kind: Any = type(value)
    freeze = _freezing(kind)
    return value if freeze is None else freeze(value)


def _is_fixed(value: Any) -> bool:
    """Whether what :func:`_frozen` tells of a value stays the same as long as the value is the same object."""
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    kind: Any = type(value)
    return _freezing(kind) in (*FIXED, _frozen_number, _of_builtin)


@cache
def _freezing(kind: type) -> Callable[[Any], Any] | None:
    """How values of a type are frozen; None for those that are as they are."""
    if issubclass(kind, float | complex):
        return _frozen_number
    if issubclass(kind, (*PLAIN, FunctionType, type)):
        return None
    if issubclass(kind, BuiltinFunctionType):
        return _of_builtin
    if issubclass(kind, tuple | list | deque):
        return lambda value: tuple([(type(part), _frozen_part(part)) for part in value])
    if issubclass(kind, dict):
        return lambda value: tuple([(_frozen_key(k), type(part), _frozen_part(part)) for k, part in value.items()])
    if issubclass(kind, frozenset):
        return frozenset
    if issubclass(kind, set):
        return lambda value: frozenset(value)
    if kind.__module__ == "numpy" and hasattr(kind, "tobytes"):
        return lambda value: (value.dtype.str, value.shape, value.tobytes())
    if issubclass(kind, array | bytearray | memoryview):
        return bytes
    return None if issubclass(kind, Number | date | time | timedelta | range) else type


def _frozen_key(key: Any) -> Hashable:
    return _Who(key) if isinstance(key, Tensor) else key


def _of_builtin(value: Any) -> Hashable:
    """A function of C, and who has it where it is a method: those of equal objects are equal."""
    return value.__name__, _Who(value.__self__)


class Reach:
    """What the code of a step reads besides its arguments: variables of closures and modules, and objects' attributes.

    Functions of the user, hooks too, are followed to whatever they name: objects, classes, modules. Tensors are read
    anew by programs, but in the same places: :meth:`tensors` tells which these are.

    Args:
        roots: the objects and functions that a step begins with.
        opt: the optimizer, whose own options are in reach; its groups are where code of the user's reads them.
        network: the modules of the wrapped network, of which only what :class:`OfNetwork` does not see is looked at.

    Attributes:
        unwatched: why nobody can tell what the code will read next; None where one can.
    """

    def __init__(self, roots: Sequence[Any], opt: ExampleOptimizer, network: OfNetwork) -> None:
        self._opt = opt
        self._roots = list(roots)
        self._network = network
        self._of_network: int | None = None
        self._places: list[Place] = []
        self._followed: list[Any] = []
        self._dicts: list[dict[Any, Any]] = []  # that things in reach may be in, with places in them or not yet
        self._lengths: list[int] = []
        self._walks = 0
        self._values: list[Any] = []
        self._state: Hashable = None
        self._numbers = Numbers()
        self._number = 0
        self._in_dicts: tuple[Any, ...] = ()  # what the last look found, to be compared by one look
        self._elsewhere: list[tuple[Place, Any]] = []
        self._inside: list[tuple[Any, Hashable]] = []
        self._objects: tuple[list[Any], tuple[type, ...]] = [], ()  # in reach, with their types
        self._functions: list[FunctionType] = []
        self._made_of: list[Any] = []
        self._kinds: list[Any] = []  # of modules
        self._forwards: list[Any] = []
        self.unwatched: str | None = None

    def number(self, of_network: int) -> int:
        """A number for all plain values that are in reach now, and for the functions and objects that they are in.

        Args:
            of_network: the number of the network as it is now.
        """
        if of_network != self._of_network or not self._is_as_it_was():
            self._look(of_network)
        return self._number

    def tensors(self) -> list[tuple[Place, Tensor]]:
        """The tensors in reach, with their places."""
        return [(place, value) for place, value in self.values() if isinstance(value, Tensor)]

    def holders(self, holders: Sequence[Any]) -> list[tuple[Place, Any]]:
        """The containers among some holders of places, and what these are in, with their places."""
        found: list[tuple[Place, Any]] = []
        wanted = {id(holder) for holder in holders if isinstance(holder, CONTAINERS)}
        known: set[int] = set()
        every = [(place, at(place)) for place in self._places]
        while wanted:
            here = [(place, value) for place, value in every if id(value) in wanted]
            known |= wanted
            wanted = {id(place[0]) for place, _ in here if isinstance(place[0], CONTAINERS)} - known
            found += here
        return found

    def cached(self) -> list[Tensor]:
        """The tensors that functions in reach keep by ``functools.lru_cache``."""
        return [tensor for thing in self._followed for tensor in cached_by(thing)]

    def containers(self) -> list[Any]:
        """The lists, deques and dictionaries in reach, with more than plain values in them."""
        return [thing for thing in self._followed if type(thing) in (list, deque, dict)]

    def values(self) -> list[tuple[Place, Any]]:
        """The plain values and tensors in reach, with their places; of places with nothing in them too."""
        found = [(place, at(place)) for place in self._places]
        return [(place, value) for place, value in found if value is MISSING or isinstance(value, (*PLAIN, Tensor))]

    def _is_as_it_was(self) -> bool:
        """Whether the same objects are everywhere, with the same in them."""
        return (
            same_items(self._in_dicts)
            and same_types(*self._objects)
            and all(map(is_, chain.from_iterable(map(_MADE_OF, self._functions)), self._made_of))
            and all(map(is_, map(_FORWARD, self._kinds), self._forwards))
            and all(_is_same(at(place), value) for place, value in self._elsewhere)
            and all(_frozen(value) == inside for value, inside in self._inside)
        )

    def _look(self, of_network: int) -> None:
        """Look at everything."""
        values, state = self._now()
        lengths = list(map(len, self._dicts))
        known = self._values if len(self._values) == len(values) else [None] * len(values)
        others = [a for a, b in zip(values, known, strict=True) if a is not b and not isinstance(a, Tensor)]
        kinds: list[Any] = list(map(type, others))
        replaced = any(_freezing(kind) is type for kind in kinds)  # of which nothing else tells
        moved = any(isinstance(other, CONTAINERS) and is_followed(other) for other in others)  # and what is in them
        if state != self._state or replaced or moved or lengths != self._lengths or of_network != self._of_network:
            self._walks += replaced
            self._walk()
            values, state = self._now()
        self._values, self._state, self._of_network = values, state, of_network
        self._number = self._numbers.of(state)
        self._lengths = list(map(len, self._dicts))
        in_dicts: dict[int, tuple[Any, int, list[Any], list[Any]]]
        in_dicts = {id(one): (one, length, [], []) for one, length in zip(self._dicts, self._lengths, strict=True)}
        self._elsewhere = []
        inputs = {id(tensor) for tensor in self._opt.carried().values()}  # of a program, others after every step
        for (holder, name), value in zip(self._places, values, strict=True):
            if id(value) in inputs:
                continue
            if isinstance(holder, dict):
                *_, keys, known = in_dicts.setdefault(id(holder), (holder, ANY_LENGTH, [], []))
                keys.append(name)
                known.append(value)
            else:
                self._elsewhere.append(((holder, name), value))
        self._in_dicts = tuple([(one, n, tuple(keys), tuple(known)) for one, n, keys, known in in_dicts.values()])
        self._inside = [(value, _frozen(value)) for value in values if not _is_fixed(value)]
        self._objects = self._objects[0], tuple(map(type, self._objects[0]))
        self._made_of = list(chain.from_iterable(map(_MADE_OF, self._functions)))
        self._forwards = list(map(_FORWARD, self._kinds))
        found = zip(self._places, values, strict=True)
        hidden = [
            f"{said(place)} is a {type(value).__name__}" for place, value in found if gives_another_each_time(value)
        ]
        self.unwatched = f"{hidden[0]}, whose next value nobody knows without taking it" if hidden else None

    def _now(self) -> tuple[list[Any], Hashable]:
        values = [at(place) for place in self._places]
        types = [type(thing) for thing in self._objects[0]]
        made_of = [*chain.from_iterable(map(_MADE_OF, self._functions)), *map(_FORWARD, self._kinds)]
        whole = [_Who(part) if is_followed(part) else _frozen_part(part) for part in made_of]
        state = self._walks, *[(type(value), _frozen(value)) for value in values], *types, *whole
        return values, state

    def _walk(self) -> None:
        """Find all places in reach."""
        modules = self._network.modules
        inside = {id(module) for module in modules}
        of_torch = {id(module) for module in modules if type(module).__module__.startswith("torch.")}
        found: dict[int, Any] = {}
        names: set[str] = set()
        places: dict[tuple[int, Any], Place] = {}
        dicts: dict[int, dict[Any, Any]] = {}
        reached = [*self._roots, self._opt, *modules, *hooks_of_all_modules()]
        named = any(root is self._opt for root in self._roots)  # the optimizer, by code of the user's
        while reached:
            for thing in reached:
                found[id(thing)] = thing
                names.update(names_read_by(thing))
            for thing in list(found.values()):
                held, of_thing = places_in(thing, names)
                if id(thing) in inside:  # what is not looked at elsewhere
                    held = []
                    if id(thing) in of_torch:
                        of_thing = [
                            (holder, name) for holder, name in of_thing if holder is vars(thing) and name in names
                        ]
                    of_thing = [place for place in of_thing if isinstance(place[0], type) or not _is_plain_at(place)]
                dicts.update((id(one), one) for one in held)
                places.update(((id(place[0]), place[1]), place) for place in of_thing)
                reached = [*reached, *members(thing, names)]
            reached = [thing for thing in (*reached, *map(at, places.values())) if is_followed(thing)]
            named = named or any(thing is self._opt for thing in reached)
            if named and "param_groups" in names:
                groups = vars(self._opt.optimizer)
                places[id(groups), "param_groups"] = groups, "param_groups"
                reached.append(groups["param_groups"])
            new = {id(thing): thing for thing in reached}
            reached = [thing for key, thing in new.items() if key not in found and key not in inside]
        # Of containers what is in them counts: tensors are looked for where they are, see holders.
        every = found.values(), self._followed
        now, before = [{id(thing) for thing in things if not isinstance(thing, CONTAINERS)} for things in every]
        self._walks += now != before
        self._followed, self._places, self._dicts = list(found.values()), list(places.values()), list(dicts.values())
        self._functions = [thing for thing in self._followed if is_function_of_user(thing)]
        no_objects = (*CONTAINERS, *CALLABLE, type)
        objects = [t for t in self._followed if not isinstance(t, no_objects) and id(t) not in inside]
        self._objects = objects, ()
        kinds: dict[int, Any] = {id(type(m)): type(m) for m in self._followed if isinstance(m, nn.Module)}
        self._kinds = [kind for kind in kinds.values() if hasattr(kind, "forward")]  # that of a scripted one has none


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, PLAIN) and _frozen(a) == _frozen(b))


def _is_plain_at(place: Place) -> bool:
    return isinstance(at(place), PLAIN)


def of_torch(device: torch.device) -> Hashable:
    """The switches of torch that choose operators or kernels."""
    kinds = {"cpu", device.type}
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)]
    backends = torch.backends
    return (
        tuple(autocast),
        modes_on(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        backends.cuda.matmul.allow_tf32,
        backends.cudnn.enabled,
        backends.cudnn.allow_tf32,
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
        backends.mkldnn.enabled,
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
    )
