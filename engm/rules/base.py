"""What a rule is: it turns a module call into terms of the module's parameters; and how a module's rule is found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..terms import PerExampleGradient, Term
from ..torch_internals import COMPUTING, computes_like, own_buffers, own_parameters, trained_of
from .arguments import Arguments

CPU = torch.device("cpu")

Activations = Tensor | tuple[Tensor | None, ...]

OUTPUT, INPUT, TURNED = "output", "input", ".T"
"""What :attr:`Rule.operators` says of an operator's inputs, besides names of parameters, see there."""
UserRule = Callable[[nn.Module, Tensor, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Cost:
    """What the norm of one layer costs for one example.

    Attributes:
        form: ``"direct"``, ``"gram"`` or ``"sum"`` (small per-example gradients, summed over positions).
        flops: floating point operations of the chosen form.
        direct_flops: floating point operations of the direct form.
        gram_flops: floating point operations of the Gram form.
        bytes: size of the operands that are read, in float32.
    """

    form: str
    flops: int
    direct_flops: int
    gram_flops: int
    bytes: int

    @classmethod
    def from_model(cls, cost: Any) -> Cost:
        """The cost that the compiled cost model gives, by which the operators choose their form too.

        Args:
            cost: what ``linear_cost`` or ``conv_cost`` of ``engm._C`` returned.
        """
        flops = cost.gram_flops if cost.form == "gram" else cost.direct_flops
        return cls(cost.form, int(flops), int(cost.direct_flops), int(cost.gram_flops), int(cost.bytes(4)))


class Rule:
    """How one layer family yields its per-example gradients; subclass it for a family.

    Attributes:
        parameter_names: the parameters of the module that the rule knows; for a module with others the rule does not
            hold.
        input_name: the name of the module's tensor argument when it is given as a keyword.
        positionwise: whether every position of every example is treated alike, so that leading dimensions may be
            flattened into one.
        always: whether calls without trained parameters are captured too, so that the nodes inside of them are
            accounted for.
        whole_call: whether the rule is a :class:`WholeCallRule`.
        joins: whether calls of one module are taken together, see :class:`WholeCallRule`.
        generic: whether the rule runs the module again, in place of a rule that nobody wrote.
        reads_for: the parameters whose terms need the activations (those of a lone bias do not); None: all.
        may_couple: whether the rule has a say in whether a module couples examples.
        picks: whether it is not simply the first argument that the rule needs again.
        saves: whether the rule keeps tensors of the forward pass.
        options: names of the attributes of a module that :meth:`terms` reads, and that may change between calls.
        operators: the operators that a layer of the family computes its output by, each with what its inputs are: the
            name of a parameter (with ``TURNED`` behind, of its transpose), ``INPUT`` for what the layer was
            called with, ``OUTPUT`` for what another of these operators made. The rule holds for a call only if
            its graph consists of them. Empty for a rule that does not depend on how the output is computed.
        on_inputs: operators that may lie between the layer's input and these.
        on_parameters: operators that may lie between a parameter and these.
    """

    reads_for: tuple[str, ...] | None = None
    may_couple = picks = saves = False
    options: tuple[str, ...] = ()
    operators: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    on_inputs: frozenset[str] = frozenset()
    on_parameters: frozenset[str] = frozenset()

    def __init_subclass__(cls) -> None:
        # Asked at every call of every layer (csrc/captured_calls.cpp), which then need not call what does nothing.
        cls.may_couple = cls.couples is not Rule.couples
        cls.picks = cls.activations is not Rule.activations
        cls.saves = cls.save is not Rule.save

    parameter_names: tuple[str, ...] = ("weight", "bias")
    input_name = "input"
    positionwise = False
    always = False
    whole_call = False
    joins = False
    generic = False

    @property
    def of_rows(self) -> bool:
        """Whether ``LinearRule.terms_of_rows`` forms the terms of calls on a row an example."""
        return False

    def known_parameters(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the parameters of ``module`` that the rule accounts for."""
        return self.parameter_names

    def couples(self, module: nn.Module) -> bool:
        """Whether the module, in its present mode, makes one example's output depend on the others."""
        return False

    def activations(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The tensor argument that the rule needs again in the backward pass, or a tuple of several (or None)."""
        return args[0] if args else kwargs.get(self.input_name)

    def misses_batch(self, module: nn.Module, output: Tensor) -> bool:
        """Whether the module was called on one example without a batch dimension, where it allows that."""
        return False

    def describes(self, module: Any, node: Any, activations: Any, shape: tuple[int, ...]) -> bool:
        """Whether the options by which :meth:`terms` reads a call are those that its operator was run with.

        Args:
            module: the layer, with the options that it had when it was called.
            node: of the one of :attr:`operators` that read the layer's input.
            activations: the layer's input; None where it is not known.
            shape: of the layer's output.
        """
        return activations is None or tuple(activations.shape) == shape

    def save(self, module: nn.Module, activations: Any, output: Tensor) -> Any:
        """Small tensors of the forward pass worth keeping (statistics), or None."""
        return None

    def terms(
        self,
        module: nn.Module,
        activations: Any,
        backprops: Any,
        saved: Any,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        """Terms of the parameters in ``names`` with every row of the call as an example.

        Args:
            module: the layer, with the options that it had when it was called.
            activations: the layer's input, ``[n, ...]``; meaningless if none of ``names`` is in :attr:`reads_for`.
                Several inputs are a tuple and are not cut, because the rule alone knows which of them have a row for
                every example.
            backprops: gradient of the summed losses with respect to the layer's output, ``[n, ...]``.
            saved: what :meth:`save` returned, not cut.
            names: the parameters that are trained.

        Returns:
            One term for each of ``names``.
        """
        raise TypeError(f"{type(self).__name__} must define terms")

    def cost(
        self,
        module: nn.Module,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> Cost:
        """Cost of the norm for one example.

        Args:
            module: the layer.
            input_shape: of the layer's input; the first dimension is the batch.
            output_shape: of the layer's output; the first dimension is the batch.
            device: where the norm is computed.
            dtype: of the layer's output.
            channels_last: whether the channels of the layer's input, a map, lie side by side in memory.
        """
        size = 1
        for length in output_shape[1:]:
            size *= length
        return Cost("sum", 4 * size, 4 * size, 4 * size, 2 * size * 4)


class WholeCallRule(Rule):
    """A rule for modules that take and return any nest of tensors; it sees the call as a whole.

    Its method ``terms`` gets the :class:`engm.rules.arguments.Arguments` of the call, tensors detached, for
    ``activations``, and for ``backprops`` one gradient (or None) for every leaf of the output, flattened as torch's
    pytrees are. The method is called once, for all rows of the call.
    """

    whole_call = True

    def joined(
        self, module: nn.Module, calls: Sequence[tuple[Arguments, Sequence[Tensor | None]]]
    ) -> tuple[Arguments, tuple[Tensor | None, ...]]:
        """Calls of one module as a single call with the examples of all of them, one call after the other.

        Asked where :attr:`joins` is set, because many small calls cost more than a large one.

        Args:
            module: the layer.
            calls: arguments and gradients of the outputs of each call.
        """
        raise TypeError(f"{type(self).__name__} must define joined")

    def before(self, module: nn.Module) -> Any:
        """What :meth:`save_call` needs to know of the time right before the module's forward, or None."""
        return None

    def batch(self, module: nn.Module, arguments: Arguments, outputs: Sequence[Any]) -> int:
        """Number of examples of a call, from its arguments and the leaves of its output; 0 if the call has none."""
        raise TypeError(f"{type(self).__name__} must define batch")

    def save_call(self, module: nn.Module, name: str, arguments: Arguments, outputs: Sequence[Any], before: Any) -> Any:
        """What the terms need besides the arguments: something small that does not refer to the graph, or None.

        Args:
            module: the layer.
            name: the layer's name in the network, for errors.
            arguments: what the layer was called with.
            outputs: leaves of the flattened output.
            before: what :meth:`before` returned.
        """
        return None

    def by_example(self, module: nn.Module, saved: Any, backprops: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients of the outputs that have one, each as ``[batch, ...]``."""
        raise TypeError(f"{type(self).__name__} must define by_example")


class FunctionRule(Rule):
    """The rule made of a user's function, which returns per-example gradients by parameter name.

    Args:
        function: what was registered with :func:`register_rule`.
        parameter_names: the parameters that the function covers; None: all of the module's own.
    """

    def __init__(self, function: UserRule, parameter_names: tuple[str, ...] | None) -> None:
        self.function = function
        self.any_parameters = parameter_names is None
        self.parameter_names = parameter_names or ()

    def activations(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if args:
            return args[0]
        return next(iter(kwargs.values()), None)

    def terms(
        self,
        module: nn.Module,
        activations: Tensor,
        backprops: Tensor,
        saved: Any,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        gradients = self.function(module, activations, backprops)
        terms: dict[str, Term] = {}
        for name in names:
            expected = (backprops.shape[0], *getattr(module, name).shape)
            got = gradients.get(name) if isinstance(gradients, Mapping) else None
            if not isinstance(got, Tensor) or tuple(got.shape) != expected:
                shown = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
                raise RuntimeError(
                    f"the rule registered for {type(module).__name__} must return a dict with the per-example gradient "
                    f"'{name}' of shape {expected}; it returned {shown}."
                )
            terms[name] = PerExampleGradient(got)
        return terms


_REGISTRY: dict[type[nn.Module], Rule] = {}
_BY_NAME: dict[str, Rule] = {}
_registrations = [0]


def registrations() -> int:
    """How often a rule was registered so far: what was looked up before the latest one has to be looked up again."""
    return _registrations[0]


def _register(module_type: type[nn.Module], rule: Rule) -> None:
    _REGISTRY[module_type] = rule
    _registrations[0] += 1


def add_rule(*module_types: type[nn.Module]) -> Callable[[type[Rule]], type[Rule]]:
    """A decorator that registers a :class:`Rule` subclass for module types; for rules inside engm."""

    def register(rule: type[Rule]) -> type[Rule]:
        for module_type in module_types:
            _register(module_type, rule())
        return rule

    return register


def register_rule(
    module_type: type[nn.Module], *, parameters: tuple[str, ...] | None = None
) -> Callable[[UserRule], UserRule]:
    """A decorator that teaches engm the per-example gradients of a layer of your own.

    The decorated function gets ``(module, activations, backprops)``: besides the module its first tensor argument,
    ``[n, ...]``, and the gradient of the summed losses with respect to its output, ``[n, ...]``, both detached. The
    function returns a dict from parameter name to per-example gradient ``[n, *parameter.shape]``. Examples must not
    influence each other inside the module, and the module must return one tensor.

    Args:
        module_type: the layer's class; subclasses that keep its ``forward`` are covered too. Registering a type again
            replaces its rule.
        parameters: names of the direct parameters that the rule covers; default: all of the module's own.

    Raises:
        TypeError: ``module_type`` is not a subclass of :class:`torch.nn.Module`, or the rule is not callable.

    Example:
        >>> @engm.register_rule(Scale)
        ... def scale(module, activations, backprops):
        ...     return {"weight": (activations * backprops).flatten(2).sum(2)}
    """
    if not (inspect.isclass(module_type) and issubclass(module_type, nn.Module)):
        raise TypeError(
            f"register_rule expects a subclass of torch.nn.Module, got {module_type!r}; "
            "use it as @engm.register_rule(MyLayer)."
        )

    def register(function: UserRule) -> UserRule:
        if not callable(function):
            raise TypeError(f"a rule must be callable as rule(module, activations, backprops), got {function!r}.")
        _register(module_type, FunctionRule(function, parameters))
        return function

    return register


def register_by_name(rule: Rule, *names: str) -> None:
    """Registers a rule for classes of packages that need not be there; for rules inside engm.

    Args:
        rule: the rule.
        names: of the classes, each with the module that defines it in front.
    """
    _BY_NAME.update(dict.fromkeys(names, rule))


def find_rule(module: nn.Module) -> Rule | str:
    """The rule that holds for ``module``, or a sentence that says why there is none."""
    for ancestor in type(module).__mro__:
        rule = _REGISTRY.get(ancestor) or _BY_NAME.get(f"{ancestor.__module__}.{ancestor.__qualname__}")
        if rule is None:
            continue
        if not computes_like(type(module), ancestor):
            return (
                f"{type(module).__name__} overrides the forward of {ancestor.__name__}, whose rule may not hold for it"
            )
        replaced = [method for method in COMPUTING if method in module.__dict__]
        if replaced:
            return f"its {replaced[0]} was replaced on the object itself, where the rule of its type may not hold"
        if any(p.is_complex() for p in trained_of(module).values()) and not isinstance(rule, FunctionRule):
            return f"it has complex parameters, which the rule for {ancestor.__name__} does not know"
        if not (isinstance(rule, FunctionRule) and rule.any_parameters):
            unknown = set(trained_of(module)).difference(rule.known_parameters(module))
            if unknown:
                return f"the rule for {ancestor.__name__} does not know its parameters {sorted(unknown)}"
            hidden = [name for name in rule.known_parameters(module) if _is_computed(module, name)]
            if hidden:
                return f"its {hidden} are computed from other tensors (a parametrization or weight_norm)"
        return rule
    return f"there is no rule for {type(module).__name__}"


def _is_computed(module: nn.Module, name: str) -> bool:
    """Whether a module has something else than a parameter of its own under the name of a parameter.

    What was computed from other tensors may be among the parameters all the same, if somebody put it there. A property
    is not asked for its value: that of a parametrization computes a weight, and a spectral norm goes on with its power
    iteration whenever it does.
    """
    own = own_parameters(module)
    if name in own:
        parameter = own[name]
        return parameter is not None and not parameter.is_leaf
    return own_buffers(module).get(name) is not None or inspect.getattr_static(module, name, None) is not None
