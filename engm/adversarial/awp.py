"""How a training step is taken at adversarially perturbed weights (AWP).

Source: Wu et al., *Adversarial Weight Perturbation Helps Robust Generalization*, 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checks import NonFiniteError
from ..loss_checks import check_losses
from ..torch_internals import copy_each, is_recorded, own_buffers, version_of
from .modes import paused

_TINY = 1e-20  # taken from the authors' code; with it a gradient of zero moves nothing


class AWP:
    """Moves the weights to where the loss is higher for as long as the update is computed.

    With ``d`` the gradient of the plain mean of the losses at the present weights, every trained parameter ``w`` of
    more than one dimension goes to ``w + gamma ||w|| d / (||d|| + 1e-20)``; biases and normalisation layers stay. The
    training step then takes its gradient, and the per-example norms, at the perturbed weights, and applies it to the
    weights as they were (its weight decay, too, where the authors' code decays the perturbed weights)::

        with awp.perturbed(lambda: objective.losses(model, x, x_adv, y)):
            losses = objective.losses(model, x, x_adv, y)
            opt.backward(losses)
        opt.step()

    A loss function for :func:`engm.record` yields its losses inside of the context, and so is recorded with it.

    Norms that the attack measured are norms at the unperturbed weights: do not lend them to the update here.

    Args:
        model: a :class:`engm.GradNormModule`, ``DistributedDataParallel`` around one, or any plain network.
        gamma: length of a parameter's perturbation, relative to the length of the parameter.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``gamma`` is negative or not finite, or ``DistributedDataParallel`` was told ``static_graph=True``.
    """

    def __init__(self, model: nn.Module, gamma: float = 5e-3) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"AWP perturbs a torch.nn.Module, got {type(model).__name__}.")
        if not (gamma >= 0 and isfinite(gamma)):
            raise ValueError(f"gamma must be a finite number >= 0, got {gamma}.")
        if isinstance(model, DistributedDataParallel) and model.static_graph:
            # DDP would take AWP's own backward pass for the first one of training and not reduce later gradients.
            raise ValueError("AWP needs DistributedDataParallel without static_graph=True.")
        self.model = model
        self.gamma = gamma
        self._open = False

    @contextmanager
    def perturbed(self, losses_fn: Callable[[], Tensor]) -> Iterator[None]:
        """The model's weights are perturbed inside this context and bit for bit the old ones after it.

        Finding the perturbation costs one forward and backward pass, which is not captured, touches no ``p.grad`` and
        leaves no trace in the buffers (running statistics). What the forward passes inside the context do to the
        buffers stays, unless the context ends with an exception: then the buffers, too, are what they were before.
        A graph that was built inside must be backpropagated inside. The context holds one copy of the perturbed
        parameters.

        Under ``DistributedDataParallel`` the gradients are averaged over the processes, so that all of them
        perturb alike.

        Args:
            losses_fn: computes the objective's losses ``[n]`` from the model's present weights.

        Raises:
            TypeError, ValueError: ``losses_fn`` does not return losses ``[n]`` with a graph that reaches a trained
                parameter of more than one dimension; nothing was changed.
            NonFiniteError: a gradient is not finite; nothing was changed.
            RuntimeError: the context is open already (nothing was changed), or the weights were changed inside (they
                are the old ones again).
        """
        if self._open:
            raise RuntimeError("this AWP perturbs its model already: leave the context before opening another one.")
        self._open = True
        try:
            buffers = _Buffers(self.model)
            try:
                ascent = self._ascent(losses_fn)
            finally:
                buffers.restore()
            weights = [weight for weight, _, _ in ascent]
            copies = [weight.detach().clone() for weight in weights]
            try:
                _climb(ascent)
                ascent.clear()
                versions = [version_of(weight) for weight in weights]
                yield
                if versions != [version_of(weight) for weight in weights]:
                    raise RuntimeError(
                        "the weights were changed while AWP had them perturbed, and that change is lost: "
                        "call opt.step() after the context, not inside it."
                    )
            except BaseException:
                buffers.restore()
                raise
            finally:
                _copy_back(weights, copies)
                torch.clear_autocast_cache()
        finally:
            self._open = False

    def _ascent(self, losses_fn: Callable[[], Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """``(weight, gradient, scale)`` of every parameter that the losses reach, to move it by their product."""
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad and p.dim() > 1}
        if not trained:
            raise ValueError("AWP perturbs trained parameters of more than one dimension, and the model has none.")
        with torch.enable_grad(), paused(self.model):
            losses = losses_fn()
            check_losses(losses)
            found = torch.autograd.grad(losses.mean(), list(trained.values()), allow_unused=True)
        if isinstance(self.model, DistributedDataParallel):
            found = _averaged(found, list(trained.values()), self.model.process_group)
        names = [name for name, gradient in zip(trained, found, strict=True) if gradient is not None]
        if not names:
            raise ValueError(
                "the losses do not depend on any trained parameter of more than one dimension of AWP's model: "
                "losses_fn must compute them from that very model."
            )
        weights, gradients = [trained[name] for name in names], [g for g in found if g is not None]
        with torch.no_grad():
            lengths = _norms(gradients)
            scales = self.gamma * _norms(weights) / (lengths + _TINY)
        # A recorded step reads no values: its losses are not finite either then, and that is noticed.
        finite = [True] * len(names) if is_recorded() else lengths.isfinite().tolist()
        odd = [name for name, known in zip(names, finite, strict=True) if not known]
        if odd:
            raise NonFiniteError(
                f"the gradient of {len(odd)} of AWP's parameters is not finite ('{odd[0]}' first), so there is no "
                "direction to perturb in; nothing was changed. Look at the losses, the learning rate and the precision."
            )
        return list(zip(weights, gradients, scales.unbind(), strict=True))


class _Buffers:
    """The buffers of a model as they are when this object is made."""

    def __init__(self, model: nn.Module) -> None:
        self._saved = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in own_buffers(module).items()
            if buffer is not None
        ]

    def restore(self) -> None:
        """Gives every module the very tensors back that it had, with the values that they had."""
        for module, name, buffer, _ in self._saved:
            own_buffers(module)[name] = buffer
        _copy_back([buffer for _, _, buffer, _ in self._saved], [copy for *_, copy in self._saved])


def _copy_back(tensors: list[Tensor], copies: list[Tensor]) -> None:
    if tensors:
        with torch.no_grad():
            copy_each(tensors, copies)


def _climb(ascent: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Moves every weight of ``(weight, gradient, scale)`` by ``scale * gradient``."""
    with torch.no_grad():
        for weight, gradient, scale in ascent:
            weight.add_(gradient.to(scale.dtype) * scale)
    torch.clear_autocast_cache()  # the cache holds the weights as they were, in lower precision


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norms ``[L]``, in float32 or better: the square of a short float overflows or vanishes."""
    return torch.stack(
        [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    )


def _averaged(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """The means of the gradients over the processes; a gradient that a process lacks counts as zero there."""
    dense = torch.contiguous_format  # processes may have different ideas of the layout
    total = [
        torch.zeros_like(parameter, memory_format=dense) if gradient is None else gradient.clone(memory_format=dense)
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]
    for gradient in total:
        dist.all_reduce(gradient, group=group)
        gradient /= dist.get_world_size(group)
    return tuple(total)
