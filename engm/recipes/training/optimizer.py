"""The outer optimizer that a configuration asks for, with the paper's thresholds where it names none."""

from __future__ import annotations

import torch

import engm

from ..addresses import is_address
from ..config import RunConfig
from ..setups import printed_alpha
from .own import own_optimizer


def paper_optimizer(
    config: RunConfig, model: engm.GradNormModule, inner: torch.optim.Optimizer
) -> engm.ExampleOptimizer:
    """Makes the outer optimizer that a configuration names.

    The paper's thresholds are ``alpha`` of 5 for ENGM and A-ENGM and 0.5 for N-ENGM on ResNet-18, 10.4 and 1.04 on
    WRN-34-10, and 25 for the global norm; on other networks, and with ``alpha="scaled"`` on these too, 5 and 0.5 are
    scaled to the network by :func:`engm.alpha_for`. F-ENGM normalises to 1, as in the paper's formula, unless ``alpha``
    is a number.

    Args:
        config: names ``optimizer``, ``alpha`` and their like.
        model: the wrapped network.
        inner: the optimizer that steps.

    Raises:
        FileNotFoundError, ValueError: see :func:`engm.recipes.training.own.own_optimizer`.
    """
    name = config.optimizer
    if is_address(name):
        return own_optimizer(name, model, inner)
    if name == "msgd":
        return engm.MSGD(model, inner)
    if name == "sngm":
        return engm.SNGM(model, inner)
    if name == "mgnc":
        return engm.GNC(model, inner, config.max_norm)
    if config.alpha == "auto":
        return engm.ENGM(model, inner, "auto", clip_fraction=config.clip_fraction)
    if name == "f-engm":
        return engm.FENGM(model, inner, 1.0 if config.alpha == "paper" else float(config.alpha))
    alpha = _threshold(config, model)
    if name == "n-engm":
        return engm.NENGM(model, inner, alpha)
    if name == "a-engm":
        return engm.AENGM(model, inner, alpha, tau=config.tau * config.accumulate, beta_gamma=config.beta_gamma)
    return engm.ENGM(model, inner, alpha)


def _threshold(config: RunConfig, model: engm.GradNormModule) -> float:
    """The number that ``alpha`` stands for."""
    if config.alpha not in ("paper", "scaled"):
        return float(config.alpha)
    printed = printed_alpha(config.model, config.width, config.optimizer) if config.alpha == "paper" else None
    return engm.alpha_for(model, config.optimizer.replace("-", "")) if printed is None else printed
