"""Objectives and optimizers of one's own, by their addresses: what they are, and what is assumed of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import engm
from engm.adversarial import PGD, Objective, evaluation_mode, objective
from engm.adversarial.ball import Norm

from ..addresses import explained, load, short_name

Losses = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""``(model, x, x_adv, y) -> losses [n]``."""


class _NoLossesError(ValueError):
    """An objective of one's own returned something else than losses."""


def own_objective(address: str, *, eval_mode: bool) -> Objective:
    """The objective that an address names.

    Args:
        address: of an :class:`engm.adversarial.Objective`, or of a function ``(model, x, x_adv, y) -> losses [n]``. Of
            such a function is assumed what is the case for MART, say: adversarial examples are those of PGD on the
            cross-entropy, from a uniform start, and no norms are borrowed from the attack, because it maximises another
            loss.
        eval_mode: attack the network in evaluation mode, whatever the objective's own attack says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such module or name, or it is neither.
    """
    found = load(address, what="objective")
    if not isinstance(found, Objective):
        if not callable(found) or isinstance(found, type):
            raise ValueError(
                f"{address} must be an engm.adversarial.Objective or a function (model, x, x_adv, y) -> losses [n], "
                f"got {'the class ' + found.__name__ if isinstance(found, type) else 'a ' + type(found).__name__}"
            )
        found = Objective(short_name(address), found, False, objective("pgd").attack)
    if found.beside is not None:
        raise ValueError(
            f"{address} keeps something beside the network, which a run would not save: only engm's own objectives do"
        )
    return Objective(
        found.name,
        _checked(found.losses, address),
        found.attack_maximises_it,
        _in_mode(found, address, eval_mode),
    )


def check_objective(found: Objective, address: str, net: nn.Module, shape: tuple[int, int, int]) -> None:
    """Computes the losses of two random images; neither the network nor the random state is changed.

    Args:
        found: from :func:`own_objective`.
        address: where it comes from, for the messages.
        net: the network.
        shape: ``(C, H, W)`` of an image.

    Raises:
        ValueError: the function fails, or does not return one loss an example.
    """
    device = next(net.parameters()).device
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    y = torch.zeros(2, dtype=torch.int64, device=device)
    wrong: ValueError | None = None
    with torch.random.fork_rng(), evaluation_mode(net), explained(f"{address}, called with (model, x, x_adv, y),"):
        try:
            found.losses(net, x, x.clone(), y)
        except _NoLossesError as error:  # which says what is wrong, and is no failure of the function
            wrong = error
    if wrong is not None:
        raise wrong


def _checked(losses: Losses, address: str) -> Losses:
    """The same function, whose losses are looked at before anything is computed from them."""

    def looked_at(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        found = losses(model, x, x_adv, y)
        if not isinstance(found, Tensor) or found.shape != y.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise _NoLossesError(
                f"{address} must return one loss an example, {list(y.shape)}, and returned {shape}: leave the mean "
                "over the batch out (reduction='none')"
            )
        return found

    return looked_at


def _in_mode(found: Objective, address: str, eval_mode: bool) -> Callable[[float, float, int, Norm], PGD]:
    def attack(eps: float, step_size: float, steps: int, norm: Norm) -> PGD:
        made = found.attack(eps, step_size, steps, norm)
        if not isinstance(made, PGD):
            raise ValueError(f"the attack of {address} must be an engm.adversarial.PGD, got a {type(made).__name__}")
        return replace(made, eval_mode=eval_mode)

    return attack


def own_optimizer(address: str, model: engm.GradNormModule, inner: torch.optim.Optimizer) -> engm.ExampleOptimizer:
    """The outer optimizer that the function at an address makes.

    Args:
        address: of a function or class that is called with ``model`` and ``inner`` and returns an optimizer of engm's,
            or one derived from :class:`engm.ExampleOptimizer`.
        model: the wrapped network.
        inner: SGD over its parameters, as ``--lr``, ``--momentum`` and ``--weight-decay`` say; the function may make
            another one in its place.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such module or name, it fails, or returns something else.
    """
    function = load(address, what="optimizer")
    if not callable(function):
        raise ValueError(f"{address} is a {type(function).__name__}; expected a function or a class")
    with explained(f"{address}, called with the wrapped network and its SGD,"):
        found = function(model, inner)
    if not isinstance(found, engm.ExampleOptimizer):
        raise ValueError(
            f"{address} must return an optimizer of engm's, which weighs examples, and returned a "
            f"{type(found).__name__}; engm.MSGD(model, optimizer) puts any optimizer of torch's behind that face"
        )
    return found
