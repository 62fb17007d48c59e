"""The clipping threshold that the paper's scaling rule suggests."""

from __future__ import annotations

from math import sqrt

from torch import nn

PAPER_PARAMETERS = 11_173_962  # ResNet-18 of the paper, 10 classes
PAPER_ALPHA = {"engm": 5.0, "aengm": 5.0, "nengm": 0.5}


def alpha_for(net: nn.Module, method: str = "engm") -> float:
    """``alpha`` scaled with the square root of the parameter count, from the paper's value for ResNet-18 (section 3.4).

    A starting point for adversarial training of image classifiers, not a law: look at the clipped fraction.

    Args:
        net: the network, wrapped or not; its trained parameters are counted.
        method: ``"engm"``, ``"aengm"`` (5 at 11.17 M parameters) or ``"nengm"`` (0.5, on the input gradient).

    Raises:
        ValueError: unknown method, or no trained parameters.
    """
    if method not in PAPER_ALPHA:
        raise ValueError(f"method must be one of {sorted(PAPER_ALPHA)}, got {method!r}.")
    count = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    if count == 0:
        raise ValueError("the network has no trained parameters, so there is no gradient to clip.")
    return PAPER_ALPHA[method] * sqrt(count / PAPER_PARAMETERS)
