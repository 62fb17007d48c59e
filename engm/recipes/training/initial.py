"""Starting from given weights: what of them fits the network, and how to tell them from others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.normalization import NAME as NORMALIZATION
from ..storage.weights_files import digest_of

SHOWN = 6  # names that a message lists


@dataclass
class Initial:
    """Weights that a run starts from.

    Attributes:
        source: where they come from, for messages.
        weights: tensors by name.
        strict: whether all of them have to fit, and all of the network's have to be given.
        left_out: names of those given that do not fit, once they are in a network.
        not_given: names of the network's own that it keeps, once they are in it.
    """

    source: str
    weights: Mapping[str, Tensor]
    strict: bool = True
    left_out: list[str] = field(default_factory=list)
    not_given: list[str] = field(default_factory=list)

    @property
    def identity(self) -> str:
        """Sixteen digits that differ if a name, a shape, a type or a number does."""
        return digest_of(self.weights)

    def put_in(self, net: nn.Module) -> None:
        """Loads what fits by name and shape, and notes what does not.

        Raises:
            ValueError: something does not fit and ``strict``, or nothing does; the network is as it was.
        """
        own = net.state_dict()
        # What the input is normalized by is a setting of the run: it need not be given, or has to be the same.
        settled = {name: tensor.cpu() for name, tensor in own.items() if name.startswith(f"{NORMALIZATION}.")}
        fitting = {n: t for n, t in self.weights.items() if n in own and own[n].shape == t.shape}
        fitting = {n: t for n, t in fitting.items() if n not in settled or torch.allclose(settled[n], t)}
        self.left_out = [
            f"{name} {list(tensor.shape)}" + _instead(own.get(name), tensor)
            for name, tensor in self.weights.items()
            if name not in fitting
        ]
        self.not_given = [name for name in own if name not in fitting and name not in settled]
        if not fitting or (self.strict and (self.left_out or self.not_given)):
            advice = "; --no-init-strict loads what fits" if fitting else ""
            raise ValueError(f"--init {self.source}: these are the weights of another network. {self}{advice}")
        net.load_state_dict(fitting, strict=False)

    def __str__(self) -> str:
        """What became of the weights, in a sentence."""
        parts = [("not in the network", self.left_out), ("not given", self.not_given)]
        said = [f"{what}: {_some(names)}" for what, names in parts if names]
        return "; ".join(said) if said else "all weights are given and fit"


def _instead(own: Tensor | None, given: Tensor) -> str:
    if own is None:
        return ""
    return f" (the network's is {list(own.shape) if own.shape != given.shape else own.tolist()})"


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
