"""The wrapper that makes a network's per-example gradients measurable."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .calibration import Calibration
from .capture import Capture
from .distributed import active_group
from .rules import Rule, find_rule

BATCH_NORM_MODES = ("calibrated", "frozen", "exact")
_OWN = frozenset(
    ["batch_norm", "strict", "views", "calibration", "checked_structures", "input_grads_wanted", "_net", "_paused"]
)


class GradNormModule(nn.Module):
    """Wraps a network so that per-example gradient norms can be taken from its losses.

    The wrapper is transparent: parameters, buffers, submodules, attributes, mode and ``state_dict`` are the
    network's own, under the network's own names. Only calls of the wrapper capture; calling the network directly,
    or the wrapper under :meth:`paused` or ``torch.no_grad()``, does not. Nothing is left on the network between calls.

    Args:
        net: the network. Every layer with trained parameters needs a rule (see :func:`engm.explain`).
        batch_norm: what a norm means where training-mode batch norm couples the examples. ``"calibrated"``: one
            backward pass with frozen statistics, mapped to the exact norms by one factor per parameter tensor;
            ``"frozen"``: that pass, raw; ``"exact"``: one backpropagation per example (the paper to the letter, slow).
        calibrate_every: training steps between two calibrations; at first an eighth, a quarter, a half of that.
        calibrate_examples: examples whose exact gradients a calibration computes.
        strict: check each new graph structure once for influence between examples and for parameters used outside
            of captured layers.
        views: rows per example, laid out as ``torch.cat([x, x_adv])`` lays them: row ``i``, ``n + i``, ... belong to
            example ``i``.

    Raises:
        TypeError: ``net`` is not a module, or is wrapped already.
        ValueError: an option is out of range, or a layer has no rule; names the layer and says what to do.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        batch_norm: str = "calibrated",
        calibrate_every: int = 50,
        calibrate_examples: int = 16,
        strict: bool = True,
        views: int = 1,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"GradNormModule wraps a torch.nn.Module, got {type(net).__name__}.")
        if isinstance(net, GradNormModule):
            raise TypeError("this network is wrapped in a GradNormModule already; use it as it is, or .unwrap() it.")
        if isinstance(net, DistributedDataParallel):
            raise TypeError("wrap the other way round: DistributedDataParallel(engm.GradNormModule(net)).")
        inner = [name for name, module in net.named_modules() if isinstance(module, GradNormModule)]
        if inner:
            raise TypeError(f"its module '{inner[0]}' is wrapped in a GradNormModule already; .unwrap() that one.")
        if batch_norm not in BATCH_NORM_MODES:
            raise ValueError(f"batch_norm must be one of {BATCH_NORM_MODES}, got {batch_norm!r}.")
        for name, value in (
            ("calibrate_every", calibrate_every),
            ("calibrate_examples", calibrate_examples),
            ("views", views),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        capture_plan(net)
        super().__init__()
        object.__setattr__(self, "_net", net)
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            object.__setattr__(self, name, net.__dict__[name])  # shared, so that all of torch sees the network
        self.batch_norm = batch_norm
        self.strict = strict
        self.views = views
        self.calibration = Calibration(calibrate_every, calibrate_examples)
        self.checked_structures: set[Any] = set()
        self.input_grads_wanted = False
        self._paused = 0

    # -- capturing -------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward; its layer calls are captured if gradients are enabled and capture is not paused."""
        if self._paused or not torch.is_grad_enabled():
            return self._net(*args, **kwargs)
        capture = Capture(self)
        capture.group = active_group()
        if self.input_grads_wanted:
            args = tuple(_with_leaf(value, capture) for value in args)
            kwargs = {name: _with_leaf(value, capture) for name, value in kwargs.items()}
        with capture.hooked(capture_plan(self._net)):
            return self._net(*args, **kwargs)

    @contextmanager
    def paused(self) -> Iterator[GradNormModule]:
        """While this context is open, calls of the wrapper are plain calls of the network."""
        self._paused += 1
        try:
            yield self
        finally:
            self._paused -= 1

    def unwrap(self) -> nn.Module:
        """The network, as clean as it was."""
        return self._net

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and tensors of the parameters that norms are taken over, in the network's order."""
        return [(name, parameter) for name, parameter in self._net.named_parameters() if parameter.requires_grad]

    # -- transparency ----------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        net = self.__dict__.get("_net")
        if net is None:
            raise AttributeError(name)
        return getattr(net, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_net" not in self.__dict__ or (name in _OWN and not isinstance(value, nn.Module)):
            object.__setattr__(self, name, value)
        else:
            setattr(self._net, name, value)

    def __delattr__(self, name: str) -> None:
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

    def __repr__(self) -> str:
        return f"GradNormModule(batch_norm={self.batch_norm!r}, views={self.views}): {self._net!r}"


def capture_plan(net: nn.Module) -> list[tuple[str, nn.Module, Rule]]:
    """``(name, module, rule)`` of the modules whose calls matter: trained parameters, or batch statistics.

    Raises:
        ValueError: a module with trained parameters has no rule.
    """
    plan = []
    for name, module in net.named_modules():
        own = [p for p in module._parameters.values() if p is not None and p.requires_grad]
        rule = find_rule(module)
        if isinstance(rule, str):
            if own:
                raise ValueError(
                    f"layer '{name}' ({type(module).__name__}) has trained parameters, and {rule}. Give it one with "
                    f"@engm.register_rule({type(module).__name__}), or freeze it with .requires_grad_(False)."
                )
            continue
        if own or rule.couples(module):
            plan.append((name, module, rule))
    return plan


def _with_leaf(value: Any, capture: Capture) -> Any:
    """A leaf that requires grad in place of a floating tensor that does not, noted in the capture."""
    if not isinstance(value, Tensor) or value.requires_grad or not value.is_floating_point():
        return value
    leaf = value.detach().requires_grad_()
    capture.inputs.append((weakref.ref(value), leaf))
    return leaf
