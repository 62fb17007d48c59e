"""The wrapper that makes a network's per-example gradients measurable."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from inspect import getattr_static
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .batch_norm.calibration import Calibration
from .capture.calls import Capture
from .capture.compiled import capturing, not_capturing, traceable
from .capture.hooks import hooked
from .capture.layers import Walks, named_modules, trained_parameters
from .capture.ranks import active_ranks
from .capture.sharded import ORDER, noting_leaves, sharded_parts, shards_of
from .graph.plan import PlanCache, PlannedGraph, Skeletons, Watch
from .names import BATCH_NORM_MODES, COUPLED_MODES
from .rules import Rule, find_rule
from .rules.fallback import GENERIC
from .torch_internals import (
    CALL_OF_A_MODULE,
    STATE_OF_A_MODULE,
    address_of,
    dynamo_in_use,
    is_exported,
    is_transformed,
    never_compiled,
    original_of_compiled,
    own_buffers,
    own_children,
    own_parameters,
    trained_of,
    untracked_alias,
)

_OWN = frozenset(
    [
        *("batch_norm", "strict", "coupled", "check_every", "calibration", "engm_plans", "_net"),
        *(
            "engm_observer",
            "engm_skeletons",
            "engm_watch",
            "input_grads_wanted",
            "shard_group",
            "_leaves",
            "_compiled_net",
        ),
        *CALL_OF_A_MODULE,
    ]
)

OPTIONS = ("batch_norm", "strict", "coupled", "check_every", "calibration")
"""Options by which the wrapper can be read and set after it was made; ``views`` is one if the network has none."""

METHODS = ("paused", "unwrap", "trainable_parameters")
"""Methods of the wrapper that modules do not have."""


class _Quiet(threading.local):
    """How often each wrapper (by id) was asked to leave its calls in this thread uncaptured."""

    def __init__(self) -> None:
        self.depth: Counter[int] = Counter()


_QUIET = _Quiet()
_NOTHING = nullcontext()


class _Paused:
    """See :meth:`GradNormModule.paused`; a generator would take longer than a small layer."""

    __slots__ = ("_model",)

    def __init__(self, model: GradNormModule) -> None:
        self._model = model

    def __enter__(self) -> GradNormModule:
        _QUIET.depth[id(self._model)] += 1
        return self._model

    def __exit__(self, *error: object) -> None:
        depth, key = _QUIET.depth, id(self._model)
        depth[key] -= 1
        if not depth[key]:
            del depth[key]


class GradNormModule(nn.Module):
    """Wraps a network so that per-example gradient norms can be taken from its losses.

    The wrapper is transparent: parameters, buffers, submodules, attributes, mode and ``state_dict`` are the
    network's own, under the network's own names. Only calls of the wrapper capture; calling the network directly,
    or the wrapper under :meth:`paused` or ``torch.no_grad()``, does not. Nothing is left on the network between calls.
    The options below can be read and set as attributes of the wrapper, and are checked then too. Where the network has
    an attribute of the same name, a warning says so, and the network's is ``model.unwrap().name``.

    Args:
        net: the network. Parameters of layers without a rule are found in the graph (see :func:`engm.explain`).
        batch_norm: what a norm means where training-mode batch norm couples the examples. ``"calibrated"``: one
            backward pass with frozen statistics, mapped to the exact norms by one factor per parameter tensor;
            ``"frozen"``: that pass, raw; ``"exact"``: one backpropagation per example (the paper to the letter, slow).
        calibrate_every: training steps between two calibrations; at first an eighth, a quarter, a half of that.
        calibrate_examples: examples whose exact gradients a calibration computes.
        strict: compare the gradients with autograd's, at the first step of every new graph structure and every
            ``check_every`` steps from then on: a sum over the examples with random signs has to be the same.
        coupled: what to do where examples influence each other's losses otherwise than by batch norms over the whole
            batch (losses of pairs, centring over the batch, batch norms over parts of it). ``"refuse"``: an error that
            names the place; ``"exact"``: take the gradients of all losses through it, which is right, and as slow as
            one backpropagation an example from there on.
        check_every: steps between two comparisons.
        views: ignored; in which rows an example lies is measured.

    Raises:
        TypeError: ``net`` is not a module, or is wrapped already.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        batch_norm: str = "calibrated",
        calibrate_every: int = 50,
        calibrate_examples: int = 16,
        strict: bool = True,
        coupled: str = "refuse",
        check_every: int = 200,
        views: int = 1,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"GradNormModule wraps a torch.nn.Module, got {type(net).__name__}.")
        if isinstance(net, GradNormModule):
            raise TypeError("this network is wrapped in a GradNormModule already; use it as it is, or .unwrap() it.")
        if isinstance(net, DistributedDataParallel):
            raise TypeError("wrap the other way round: DistributedDataParallel(engm.GradNormModule(net)).")
        shard_group = shards_of(net)
        given: dict[str, Any] = {"batch_norm": batch_norm, "coupled": coupled, "check_every": check_every}
        given |= {"calibrate_every": calibrate_every, "calibrate_examples": calibrate_examples, "views": views}
        for name, value in given.items():
            _check_option(name, value, shard_group is not None)
        layers_to_capture(net)
        hidden = [name for name in (*OPTIONS, *METHODS) if _has(net, name)]
        if hidden:
            warnings.warn(
                f"{type(net).__name__} has attributes with names of the wrapper's own: {', '.join(hidden)}. As "
                "attributes of the GradNormModule they are the wrapper's; write "
                f"model.unwrap().{hidden[0]} for the network's.",
                stacklevel=2,
            )
        super().__init__()
        object.__setattr__(self, "_net", net)
        object.__setattr__(self, "_walks", Walks(net))
        for name in STATE_OF_A_MODULE:
            object.__setattr__(self, name, net.__dict__[name])
        self.batch_norm = batch_norm
        self.strict = strict
        self.coupled = coupled
        self.check_every = check_every
        if not _has(net, "views"):  # which nothing of ours reads
            object.__setattr__(self, "views", views)
        self.calibration = Calibration(calibrate_every, calibrate_examples)
        self.engm_plans = PlanCache()
        self.engm_skeletons = Skeletons()
        self.engm_watch = Watch()
        self.engm_observer: Callable[[PlannedGraph, Hashable], None] | None = None
        self.input_grads_wanted = False
        self.shard_group = shard_group
        self._leaves: dict[str, nn.Parameter] = {}
        self._compiled_net: nn.Module | None = None

    # -- capturing -------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward; its layer calls are captured if gradients are enabled and capture is not paused.

        A call from within the forward pass of this very wrapper is captured with that. Calls under the transforms of
        ``torch.func`` (which have graphs of their own), and those that are traced or exported, are plain ones.
        """
        quiet = id(self) in _QUIET.depth or not torch.is_grad_enabled() or is_exported()
        if torch.compiler.is_compiling():
            return self._net(*args, **kwargs) if quiet else self._captured_uncompiled(args, kwargs)
        if quiet or is_transformed():
            with not_capturing():
                return self._network()(*args, **kwargs)
        return self._captured(args, kwargs)

    @never_compiled
    def _captured_uncompiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A captured call from inside a region that is compiled around the wrapper."""
        warnings.warn(
            "torch.compile around a GradNormModule leaves its captured forward passes uncompiled. Compile the network "
            "inside instead: model.compile(), which takes the same arguments.",
            stacklevel=2,
        )
        return self._captured(args, kwargs)

    def _captured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        capture = Capture(self)
        capture.ranks = active_ranks(self.shard_group)
        capture.note_inputs(args, kwargs)
        if self.input_grads_wanted:
            args = tuple(_with_leaf(value, capture) for value in args)
            kwargs = {name: _with_leaf(value, capture) for name, value in kwargs.items()}
        sharded, with_rules = self._walks.found_by_both(sharded_parts, _layers_with_rules)
        layers = _those_that_matter(with_rules)
        compiled = dynamo_in_use()
        regions = capturing(capture, layers) if compiled else _NOTHING
        noting = noting_leaves(sharded, self.shard_group, self._leaves) if sharded else _NOTHING
        with regions, hooked(capture, layers, traceable if compiled else None), self.paused(), noting:
            outputs = self._network()(*args, **kwargs)
        capture.mark(outputs)
        return outputs

    def paused(self) -> AbstractContextManager[GradNormModule]:
        """While this context is open, calls of the wrapper in this thread are plain calls of the network."""
        return _Paused(self)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Run the network compiled from now on. Its layers stay captured, and the network itself stays as it is.

        Args:
            *args: those of :func:`torch.compile`.
            **kwargs: those of :func:`torch.compile`.
        """
        object.__setattr__(self, "_compiled_net", torch.compile(self._net, *args, **kwargs))  # not a part of the net

    def _network(self) -> nn.Module:
        return self._net if self._compiled_net is None else self._compiled_net

    def unwrap(self) -> nn.Module:
        """The network, as clean as it was."""
        return self._net

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and tensors of the parameters that norms are taken over, in the network's order.

        Under ``fully_shard`` the whole copies that the latest forward pass ran with, not the shards.
        """
        found = self._walks.found(trained_parameters)
        return [(name, self._leaves.get(name, parameter)) for name, parameter in found] if self._leaves else [*found]

    # -- transparency ----------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        net = self.__dict__.get("_net")
        if net is None:
            raise AttributeError(name)
        return getattr(net, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":  # how fully_shard and parametrizations take hold of a module
            raise TypeError(f"a GradNormModule keeps its class. With fully_shard, {ORDER}")
        ours = (name in _OWN or (name == "views" and name in self.__dict__)) and not isinstance(value, nn.Module)
        if ours and name in ("batch_norm", "coupled", "check_every"):
            _check_option(name, value, self.__dict__.get("shard_group") is not None)
        bound = isinstance(value, MethodType) and value.__self__ is self  # Accelerate gives the wrapper a new forward
        if "_net" not in self.__dict__ or ours or bound:
            object.__setattr__(self, name, value)
        else:
            setattr(self._net, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self._net, name)

    @property
    def training(self) -> bool:
        """The network's mode."""
        net = self.__dict__.get("_net")
        return True if net is None else net.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_net" in self.__dict__:
            self._net.training = mode

    def train(self, mode: bool = True) -> GradNormModule:
        """Set the network's mode."""
        self._net.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> GradNormModule:
        self._net._apply(fn, recurse)
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> GradNormModule:
        """Apply ``fn`` to the network and every module in it."""
        self._net.apply(fn)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # as a part of a larger module
        self._net._load_from_state_dict(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The network's ``state_dict``, without a prefix of ours."""
        return self._net.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The network's ``load_state_dict``."""
        return self._net.load_state_dict(state_dict, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Plans know modules and parameters by id; and as everywhere in torch a copy is not compiled.
        return {
            **super().__getstate__(),
            "engm_plans": PlanCache(),
            "engm_skeletons": Skeletons(),
            "engm_watch": Watch(),
            "engm_observer": None,
            "_compiled_net": None,
            "_walks": Walks(self._net),
        }

    def __repr__(self) -> str:
        return f"GradNormModule(batch_norm={self.batch_norm!r}, coupled={self.coupled!r}): {self._net!r}"


# By tensor (id) that a network was given, the tensor and the leaf in its place, as long as there are graphs behind it.
_LEAVES: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = {}


def _has(net: nn.Module, name: str) -> bool:
    """Whether a network has an attribute of this name; a property is not asked for its value."""
    if name in vars(net) or getattr_static(type(net), name, None) is not None:
        return True
    return any(name in held for held in (own_parameters(net), own_buffers(net), own_children(net)))


def _check_option(name: str, value: Any, sharded: bool) -> None:
    """Refuses a value of an option of the wrapper that is out of range.

    Raises:
        ValueError: it is.
    """
    modes = {"batch_norm": BATCH_NORM_MODES, "coupled": COUPLED_MODES}.get(name)
    if modes is not None and value not in modes:
        raise ValueError(f"{name} must be one of {modes}, got {value!r}.")
    if modes is None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    if sharded and value == "exact" and name == "batch_norm":
        raise ValueError(
            "batch_norm='exact' backpropagates once an example, and under fully_shard every process would have to do "
            "so equally often. Leave it at 'calibrated'."
        )


def couples(model: GradNormModule) -> bool:
    """Whether some layer takes statistics from the batch, as batch norms in training mode do, in its present mode."""
    return any(rule.couples(module) for (_, module, rule), _ in model._walks.found(_layers_with_rules))


Layer = tuple[str, nn.Module, Rule]  # a module by its name, and the module's rule


def layers_to_capture(net: nn.Module) -> list[Layer]:
    """The modules whose calls matter: those with trained parameters, or with batch statistics.

    Raises:
        TypeError: a module is wrapped by itself.
    """
    return _those_that_matter(_layers_with_rules(net))


def _those_that_matter(layers: list[tuple[Layer, bool]]) -> list[Layer]:
    """Those of :func:`_layers_with_rules` whose calls matter in the modes that they are in."""
    return [layer for layer, trained in layers if trained or layer[2].always or layer[2].couples(layer[1])]


def _layers_with_rules(net: nn.Module) -> list[tuple[Layer, bool]]:
    """The modules whose calls matter in some mode, and whether they have trained parameters."""
    layers = []
    for name, module in named_modules(net):
        if isinstance(module, GradNormModule):
            raise TypeError(f"module '{name}' is wrapped in a GradNormModule already; .unwrap() that one.")
        own = trained_of(module)
        rule = find_rule(module)
        if isinstance(rule, str):
            rule = GENERIC  # used where its parameters cannot be told from the graph
        if own or rule.always or rule.may_couple:
            layers.append(((name, module, rule), bool(own)))
    return layers


def _with_leaf(value: Any, capture: Capture) -> Any:
    """The tensor that replaces an input: for a floating tensor without grad, one behind a leaf that requires grad.

    The leaf is noted in the capture; a tensor that is given again while the graph of the pass before is there has the
    same, so that there is one gradient with respect to it. The tensor is neither the leaf nor a view of the leaf, so
    that a network may change its input in place, as it may without us. Other values stay as they are.
    """
    if not isinstance(value, Tensor) or value.requires_grad or not value.is_floating_point():
        return value
    leaf = _leaf_of(value)
    if leaf is None:
        leaf = value.detach().requires_grad_()
        for key, (_, other) in list(_LEAVES.items()):
            if other() is None:
                _LEAVES.pop(key, None)
        _LEAVES[id(value)] = weakref.ref(value), weakref.ref(leaf)
    capture.inputs.append((weakref.ref(value), leaf))
    alias = untracked_alias(leaf)
    plain = type(value).__torch_dispatch__ is Tensor.__torch_dispatch__ and not isinstance(value, nn.Parameter)
    if plain and type(alias) is not type(value):
        alias = alias.as_subclass(type(value))
        vars(alias).update(vars(value))
    return alias


def _leaf_of(value: Tensor) -> Tensor | None:
    """The leaf that a tensor has from a pass before; None without one, and where the tensor has other memory now."""
    if id(value) not in _LEAVES or value.layout != torch.strided or value.is_nested:
        return None
    given, leaf = (reference() for reference in _LEAVES[id(value)])
    if given is not value or leaf is None:
        return None
    lie = [(each.dtype, each.shape, each.stride(), address_of(each)) for each in (value, leaf)]
    return leaf if lie[0] == lie[1] and address_of(value) else None


def as_wrapped(model: nn.Module) -> GradNormModule:
    """The wrapper behind ``model`` (itself, or inside ``DistributedDataParallel`` or ``torch.compile``).

    Raises:
        TypeError: nobody wrapped it, or it is no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected engm.GradNormModule(net), got {type(model).__name__}: parameters go to the torch optimizer, "
            "as in engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1))."
        )
    if isinstance(model, DistributedDataParallel):
        model = model.module
    inside = original_of_compiled(model)
    if isinstance(inside, GradNormModule):
        model = inside
    if not isinstance(model, GradNormModule):
        raise TypeError(
            f"expected a model wrapped as engm.GradNormModule(net), got {type(model).__name__}: wrap it, and compute "
            "the losses with the wrapped model."
        )
    return model
