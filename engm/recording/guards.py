"""What a recorded program holds for: everything that a step reads besides the numbers in tensors.

Two steps with equal keys run the same operators: sizes, types and devices of the batch, what the network consists of,
its modes and options, the optimizer's options, the numbers that the loss function closes over, and torch's switches.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from enum import Enum
from functools import cache, partial
from itertools import count
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.held import ANY_LENGTH, Held
from ..capture.layers import named_modules
from ..module import GradNormModule
from ..torch_internals import hooks_of, own_buffers, own_children, own_parameters
from .refusals import OURS

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format, Enum)
Place = tuple[Any, Any]  # a dict, list or cell, and the key, number or name there
FIXED: tuple[Any, ...] = (None, type, frozenset)  # ways of freezing values that cannot be changed from within
MOST_STATES = 1000  # that are remembered
OF_A_MODULE = frozenset(nn.Module().__dict__)  # what torch itself keeps in every module


def of_leaf(leaf: Any) -> Hashable:
    """What a program depends on of one of a step's arguments."""
    if isinstance(leaf, Tensor):
        layout = leaf.stride() if leaf.layout == torch.strided else leaf.layout
        return type(leaf), tuple(leaf.shape), layout, leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), leaf


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
        model = self._model
        modules = [module for _, module in named_modules(model.unwrap())]
        if modules != self._modules:
            self._modules = modules
        state: list[Any] = [model.batch_norm, model.strict, model.coupled]
        self._inside = []
        whole: list[Any] = []
        parts: list[tuple[dict[str, Any], int, tuple[str, ...]]]
        parts = [(vars(model), ANY_LENGTH, ("batch_norm", "strict", "coupled"))]
        tensors: list[Tensor] = []
        written: list[bool] = []
        for module in modules:
            attributes = vars(module)
            names = _names_of_options(attributes)
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
            written += [False] * (len(tensors) - len(written))
            # Indices are baked in wherever the engine has looked at them; counters change at every step.
            buffers = [buffer for buffer in own_buffers(module).values() if buffer is not None]
            tensors += buffers
            written += [not buffer.is_floating_point() and buffer.dim() > 0 for buffer in buffers]
        self._held = Held(modules, whole, parts, tensors, written)
        self._number = self._numbers.of((*state, self._held.facts))


def _names_of_options(attributes: dict[str, Any]) -> list[str]:
    """The attributes of a module that are not torch's, and the module's mode."""
    return [name for name in attributes if name == "training" or name not in OF_A_MODULE]


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
    return _freezing(kind) in FIXED


@cache
def _freezing(kind: type) -> Callable[[Any], Any] | None:
    """How values of a type are frozen; None for those that are as they are."""
    if issubclass(kind, (*PLAIN, FunctionType, BuiltinFunctionType, type)):
        return None
    if issubclass(kind, tuple | list):
        return lambda value: tuple([(type(part), _frozen(part)) for part in value])
    if issubclass(kind, dict):
        return lambda value: tuple([(key, type(part), _frozen(part)) for key, part in value.items()])
    if issubclass(kind, frozenset):
        return frozenset
    if issubclass(kind, set):
        return lambda value: frozenset(value)
    if kind.__module__ == "numpy" and hasattr(kind, "tobytes"):
        return lambda value: (value.dtype.str, value.shape, value.tobytes())
    return type


class Reach:
    """What the code of a step reads besides its arguments: variables of closures and modules, and objects' attributes.

    Functions of the user are followed to whatever they name. Tensors are read anew by programs, but in the same places:
    :meth:`tensors` tells which these are.

    Args:
        roots: the objects and functions that a step begins with.
        left_out: what is looked at elsewhere.
        network: the modules of the wrapped network, of which only what :class:`OfNetwork` does not see is looked at.
    """

    def __init__(self, roots: Sequence[Any], left_out: Sequence[Any], network: OfNetwork) -> None:
        self._roots = roots
        self._left_out = {id(thing) for thing in left_out}
        self._network = network
        self._of_network: int | None = None
        self._places: list[Place] = []
        self._followed: list[Any] = []
        self._walks = 0
        self._values: list[Any] = []
        self._state: Hashable = None
        self._numbers = Numbers()

    def number(self, of_network: int) -> int:
        """A number for all plain values that are in reach now, and for the functions and objects that they are in.

        Args:
            of_network: the number of the network as it is now.
        """
        values, state = self._now()
        replaced = len(values) != len(self._values) or any(
            a is not b and is_followed(a) for a, b in zip(values, self._values, strict=True)
        )
        if state != self._state or replaced or of_network != self._of_network:
            self._walk()
            values, state = self._now()
        self._values, self._state, self._of_network = values, state, of_network
        return self._numbers.of(state)

    def tensors(self) -> list[tuple[Place, Tensor]]:
        """The tensors in reach, with their places."""
        return [(place, value) for place, value in self.values() if isinstance(value, Tensor)]

    def values(self) -> list[tuple[Place, Any]]:
        """The plain values and tensors in reach, with their places."""
        found = [(place, at(place)) for place in self._places]
        return [(place, value) for place, value in found if isinstance(value, (*PLAIN, Tensor))]

    def _now(self) -> tuple[list[Any], Hashable]:
        values = [at(place) for place in self._places]
        return values, (self._walks, *[(type(value), _frozen(value)) for value in values])

    def _walk(self) -> None:
        """Find all places in reach."""
        modules = self._network.modules
        inside = {id(module) for module in modules}
        found: dict[int, Any] = {}
        names: set[str] = set()
        places: dict[tuple[int, Any], Place] = {}
        reached = [*self._roots, *[module for module in modules if not type(module).__module__.startswith("torch.")]]
        while reached:
            for thing in reached:
                found[id(thing)] = thing
                names.update(_names_in(getattr(thing, "__code__", None)))
            for thing in list(found.values()):
                for place in _places_in(thing, names):
                    if id(thing) not in inside or not isinstance(at(place), PLAIN):
                        places[id(place[0]), place[1]] = place
                reached = [*reached, *_members(thing, names)]
            reached = [thing for thing in (*reached, *map(at, places.values())) if is_followed(thing)]
            new = {id(thing): thing for thing in reached}
            reached = [thing for key, thing in new.items() if key not in found and key not in self._left_out | inside]
        same = len(found) == len(self._followed) and all(id(thing) in found for thing in self._followed)
        self._walks += not same
        self._followed, self._places = list(found.values()), list(places.values())


def at(place: Place) -> Any:
    """What is in a place."""
    holder, name = place
    if isinstance(holder, CellType):
        return _content(holder)
    if isinstance(holder, dict):
        return holder.get(name)
    return holder[name] if name < len(holder) else None


def put_at(place: Place, value: Any) -> None:
    """Put a value back where it was."""
    holder, name = place
    if isinstance(holder, CellType):
        holder.cell_contents = value
    elif isinstance(holder, dict) or (isinstance(holder, list) and name < len(holder)):
        holder[name] = value


def said(place: Place) -> str:
    """The name of a place."""
    return str(place[1])


def is_followed(thing: Any) -> bool:
    """Whether what a thing holds may matter to a step: not if it is a plain value, a tensor, a class or a library's.

    Of libraries' objects torch's and ours are looked at, and all modules.
    """
    if isinstance(thing, (*PLAIN, Tensor, type, ModuleType, torch.optim.Optimizer, GradNormModule)):
        return False
    if isinstance(thing, FunctionType):
        return not thing.__code__.co_filename.startswith(_libraries())
    if isinstance(thing, nn.Module | MethodType | partial):
        return True
    if isinstance(thing, list | tuple | dict):
        return not _is_plain(thing)
    source = getattr(sys.modules.get(type(thing).__module__), "__file__", None) or ""
    return hasattr(thing, "__dict__") and (_is_ours(thing) or not source.startswith(_libraries()))


@cache
def _libraries() -> tuple[str, ...]:
    """The folders of what is installed, and of this package."""
    folders = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    return OURS, *(os.path.join(folder, "") for folder in sorted(folders))


def _is_ours(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] in ("engm", "torch")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return all(map(_is_plain, value.values())) if isinstance(value, dict) else isinstance(value, PLAIN)


def _names_in(code: Any) -> Iterator[str]:
    if isinstance(code, CodeType):
        yield from code.co_names
        for constant in code.co_consts:
            yield from _names_in(constant)


def _places_in(thing: Any, names: Collection[str]) -> list[Place]:
    """Where a thing holds what the code that has these names in it may read."""
    if isinstance(thing, FunctionType):
        cells: list[Place] = [
            (cell, name) for cell, name in zip(thing.__closure__ or (), thing.__code__.co_freevars, strict=True)
        ]
        return cells + [(thing.__globals__, n) for n in {*_names_in(thing.__code__)} if n in thing.__globals__]
    if isinstance(thing, list | tuple):
        return [(thing, number) for number in range(len(thing))]
    if isinstance(thing, dict):
        return [(thing, key) for key in thing]
    attributes = getattr(thing, "__dict__", {})
    if isinstance(thing, nn.Module):
        held = own_parameters(thing), own_buffers(thing), own_children(thing)
        inside = [(kind, name) for kind in held for name in kind]
        return inside + [(attributes, name) for name in _names_of_options(attributes)]
    if not isinstance(attributes, dict):
        return []
    return [(attributes, name) for name in attributes if name in names or _is_ours(thing)]


def _members(thing: Any, names: Collection[str]) -> list[Any]:
    """What belongs to a thing as long as that lives, but for its places."""
    if isinstance(thing, FunctionType):
        return [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, list | tuple | dict):
        return []
    kind = type(thing)
    found = [getattr(kind, name, None) for name in {*names, "__call__", "forward"}]
    found = [function.fget if isinstance(function, property) else function for function in found]
    return [function for function in found if isinstance(function, FunctionType)]


def of_object(thing: Any, left_out: Sequence[str]) -> Hashable:
    """The plain attributes of an object, but for some."""
    plain = [item for item in vars(thing).items() if isinstance(item[1], (*PLAIN, tuple, list))]
    return tuple([(name, type(value), _frozen(value)) for name, value in plain if name not in left_out])


def of_torch(device: torch.device) -> Hashable:
    """The switches of torch that choose operators or kernels."""
    kinds = {"cpu", device.type}
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)]
    backends = torch.backends
    return (
        tuple(autocast),
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


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None
