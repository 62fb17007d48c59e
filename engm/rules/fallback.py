"""Per-example gradients for modules without a rule: the module alone is run again on one example at a time.

``torch.func.vmap`` over the module's vector-Jacobian product gives the per-example gradients of its own parameters from
the gradients of its outputs, at the price of one more forward and backward pass of the module and a gradient of the
parameters' size for every example. Where vmap cannot go (control flow that depends on data, operators without a
batching rule) the examples are looped over.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import RefusedError
from ..terms import PerExampleGradient, Term
from ..torch_internals import own_parameters, tree_leaves, tree_unflatten
from .arguments import Arguments
from .base import WholeCallRule, register_by_name

CHUNK_BYTES = 64 << 20  # memory that the examples which are run at once may take
HELD = 8  # tensors of the size of its arguments that a module is assumed to hold while it runs
SAMPLE = 4096  # elements of an output that are compared
SPREAD = 2654435761  # a prime: its multiples modulo a tensor's size reach elements all over the tensor


@dataclass(frozen=True)
class Remembered:
    """What is kept of a call besides its arguments.

    Attributes:
        name: the module's name in the network.
        batch: number of examples.
        samples: some elements of each output, by its place among the leaves, to compare the second run with.
        autocast: whether autocast was on, and its dtype.
    """

    name: str
    batch: int
    samples: dict[int, Tensor]
    autocast: tuple[bool, torch.dtype]


class GenericRule(WholeCallRule):
    """Per-example gradients of the parameters that a module holds directly, by running the module again.

    Parameters of its children are constants here, because the children's calls have rules of their own. Tensor
    arguments whose first dimension is the batch are cut into examples, with a batch dimension of 1; others (masks,
    scalars, None) are passed as they are. Outputs must have their examples along the first dimension, one or more rows
    each.

    A module that draws random numbers, keeps state, changes its arguments or takes statistics from the batch does not
    give the same output again. So 4,096 elements of the output are compared with the forward pass every time.

    The module's buffers and attributes are left as they were; forward hooks of its children run again.
    """

    generic = True

    def __init__(self) -> None:
        self._looped: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that vmap cannot run

    def known_parameters(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(own_parameters(module))

    def batch(self, module: nn.Module, arguments: Arguments, outputs: Sequence[Any]) -> int:
        taken = [t.shape[0] for t in arguments.flattened[0] if isinstance(t, Tensor) and t.dim()]
        given = [t.shape[0] for t in outputs if _differentiable(t) and t.dim()]
        if not taken or not given:
            return 0
        if given[0] in taken:
            return int(given[0])
        return int(taken[0]) if taken[0] and given[0] % taken[0] == 0 else 0

    def save_call(
        self, module: nn.Module, name: str, arguments: Arguments, outputs: Sequence[Any], before: Any
    ) -> Remembered:
        device = next(t for t in outputs if _differentiable(t)).device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        samples = {place: _sample(t.detach()) for place, t in enumerate(outputs) if _differentiable(t)}
        return Remembered(name, self.batch(module, arguments, outputs), samples, autocast)

    def by_example(self, module: nn.Module, saved: Remembered, backprops: Sequence[Tensor | None]) -> list[Tensor]:
        return [_rows(g, saved.batch) for g in backprops if g is not None and _divides(g, saved.batch)]

    def terms(
        self,
        module: nn.Module,
        activations: Arguments,
        backprops: Sequence[Tensor | None],
        saved: Remembered,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        given = {place: g for place, g in enumerate(backprops) if g is not None}
        whole = [tuple(g.shape) for g in given.values() if not _divides(g, saved.batch)]
        if whole:
            raise RefusedError(
                f"engm: the losses depend on an output of shape {whole[0]} of module '{saved.name}' "
                f"({type(module).__name__}), which does not hold the {saved.batch} examples along its first dimension. "
                "Give the module a rule with @engm.register_rule, or let it return a row for every example."
            )
        run = _Run(module, activations, saved, tuple(given), names)
        split = [_rows(g, saved.batch) for g in given.values()]
        with _same_attributes(module):
            gradients, outputs = self._run(run, split)
        for place, output in zip(given, outputs, strict=True):
            _check_same(module, saved, place, output)
        return {name: PerExampleGradient(gradients[name]) for name in names}

    def _run(self, run: _Run, backprops: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        if run.module not in self._looped:
            try:
                return run.batched(backprops)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                pass  # vmap cannot run the module; if the module itself fails, the loop below raises the error again
        found = run.looped(backprops)
        self._looped.add(run.module)
        return found


class _Alone(nn.Module):
    """A module's forward without the module's own hooks, because what these do lies outside of the captured call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


class _Run:
    """A module about to be run again.

    Args:
        module: the module.
        arguments: what the module was called with.
        saved: what was kept of the call besides.
        places: leaves of the flattened output that are wanted.
        names: parameters to differentiate.
    """

    def __init__(
        self, module: nn.Module, arguments: Arguments, saved: Remembered, places: tuple[int, ...], names: Sequence[str]
    ) -> None:
        self.module, self.saved, self.places = module, saved, places
        self._alone = _Alone(module)
        self._leaves, self._spec = arguments.flattened
        self._cut = [k for k, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor) and self._has_rows(leaf)]
        self.own = {name: module.get_parameter(name).detach() for name in names}
        self._constants = {
            name: parameter.detach()
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if name not in self.own
        }

    def _has_rows(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] == self.saved.batch

    def batched(self, backprops: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Per-example gradients of the parameters, and the wanted outputs ``[batch, rows, ...]``, by vmap."""

        def of_one(arguments: list[Tensor], backprops: list[Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
            found: tuple[Any, ...] = torch.func.vjp(lambda own: self._outputs(own, arguments), self.own)
            outputs, pull = found
            return pull(tuple(backprops))[0], outputs

        arguments = [self._leaves[k] for k in self._cut]
        chunk = self._chunk([*arguments, *backprops])
        mapped = torch.func.vmap(of_one, in_dims=(0, 0), randomness="different", chunk_size=chunk)
        gradients, outputs = mapped(arguments, list(backprops))
        return {name: g.detach() for name, g in gradients.items()}, [o.detach() for o in outputs]

    def looped(self, backprops: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Per-example gradients of the parameters, and the wanted outputs ``[batch, rows, ...]``, by a loop."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.own}
        results: list[list[Tensor]] = [[] for _ in backprops]
        for i in range(self.saved.batch):
            own = {name: p.detach().requires_grad_() for name, p in self.own.items()}
            with torch.enable_grad():
                outputs = self._outputs(own, [self._leaves[k][i] for k in self._cut])
            reached = [(o, g[i]) for o, g in zip(outputs, backprops, strict=True) if o.requires_grad]
            gradients: Sequence[Tensor | None] = [None] * len(own)
            if reached:
                gradients = torch.autograd.grad(
                    [o for o, _ in reached], list(own.values()), [g for _, g in reached], allow_unused=True
                )
            for (name, p), gradient in zip(own.items(), gradients, strict=True):
                found[name].append(torch.zeros_like(p) if gradient is None else gradient)
            for result, output in zip(results, outputs, strict=True):
                result.append(output.detach())
        return {name: torch.stack(rows).detach() for name, rows in found.items()}, [torch.stack(r) for r in results]

    def _outputs(self, own: dict[str, Tensor], arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The wanted outputs for one example, whose arguments come without a batch dimension."""
        leaves = list(self._leaves)
        for k, argument in zip(self._cut, arguments, strict=True):
            leaves[k] = argument.unsqueeze(0)
        args, kwargs = tree_unflatten(leaves, self._spec)
        buffers = {name: b.clone() for name, b in self.module.named_buffers(remove_duplicate=False)}
        state = {f"module.{name}": t for name, t in (self._constants | own | buffers).items()}
        enabled, dtype = self.saved.autocast
        with torch.autocast(self._device, dtype=dtype, enabled=enabled, cache_enabled=False):
            # Weights are not tied: a child that shares a parameter uses it in a call of its own.
            output = torch.func.functional_call(self._alone, state, args, kwargs, tie_weights=False)
        found = tree_leaves(output)
        return tuple(found[place] for place in self.places)

    @property
    def _device(self) -> str:
        return next(iter(self.own.values())).device.type

    def _chunk(self, mapped: Sequence[Tensor]) -> int:
        """Number of examples to run at once."""
        example = sum(p.nbytes for p in self.own.values()) + HELD * sum(t.nbytes // self.saved.batch for t in mapped)
        return max(1, min(self.saved.batch, CHUNK_BYTES // max(1, example)))


class RunAgainRule(GenericRule):
    """The generic rule where it is the cheapest way: for layers whose operator torch cannot cut into examples.

    Its backward pass takes as long for the gradient of one example as for all, unless it is run on one alone.
    """

    generic = False


GENERIC = GenericRule()
register_by_name(RunAgainRule(), "torchvision.ops.deform_conv.DeformConv2d")


@contextmanager
def _same_attributes(module: nn.Module) -> Iterator[None]:
    """Undoes what the module sets on itself or on its children inside the context, an attention map of a run, say."""
    before = [(m, dict(vars(m))) for m in module.modules()]
    try:
        yield
    finally:
        for m, attributes in before:
            now = vars(m)
            for name in now.keys() - attributes.keys():
                del now[name]
            for name, value in attributes.items():
                if name not in now or now[name] is not value:
                    now[name] = value


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _divides(tensor: Tensor, batch: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] % batch == 0


def _rows(tensor: Tensor, batch: int) -> Tensor:
    """A tensor that holds its examples along the first dimension, as ``[batch, rows of one example, ...]``."""
    return tensor.reshape(batch, tensor.shape[0] // batch, *tensor.shape[1:])


def _sample(tensor: Tensor) -> Tensor:
    """At most :data:`SAMPLE` elements of a tensor, ``[count]``, always from the same places."""
    count = min(tensor.numel(), SAMPLE)
    if count == tensor.numel():
        return tensor.flatten().clone()
    return torch.take(tensor, torch.arange(count, device=tensor.device) * SPREAD % tensor.numel())


def _check_same(module: nn.Module, saved: Remembered, place: int, output: Tensor) -> None:
    """Compares an output of the run, ``[batch, rows, ...]``, with that of the forward pass.

    Raises:
        RuntimeError: the two are not the same, within rounding.
    """
    if output.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # a stream that is captured may not be read; the warm-up before the capture was compared
    expected, got = saved.samples[place], _sample(output.reshape(-1))
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    if output.is_cuda:
        tolerance = max(tolerance, 5e-3)  # one of the two runs may use a kernel with TF32
    finite = expected.isfinite()
    scale = expected[finite].abs().max() if bool(finite.any()) else expected.new_ones(())
    if expected.shape != got.shape or bool(((got - expected).abs() > tolerance * scale)[finite].any()):
        raise RefusedError(
            f"engm: module '{saved.name}' ({type(module).__name__}) has parameters of its own and no rule, so its "
            "per-example gradients are found by running it again on one example at a time; but that gave another "
            "output than the forward pass. It draws random numbers (dropout), keeps state, changes its input, or mixes "
            "the examples (batch norm in training mode). Put what does so into a module of its own, or give this one a "
            f"rule with @engm.register_rule({type(module).__name__})."
        )
