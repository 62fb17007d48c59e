"""What a method keeps beside the network and changes in training: LBGAT's guide, the labels of self-adaptive training.

Each is the ``beside`` of an :class:`~engm.adversarial.Objective`, and is a part of a training run's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Beside(Protocol):
    """What a training step does with the things that a method keeps beside the network.

    For every batch, or every part of one, :meth:`before` gives what the losses are computed from besides the batch, and
    :meth:`after` is told these losses, before their graph is used up. :meth:`step` follows the optimizer's step::

        given = beside.before(x, y, rows)
        losses = objective.losses(model, x, x_adv, y, given)
        beside.after(given, losses, 1.0)
        opt.backward(losses)
        opt.step()
        beside.step()
    """

    def before(self, x: Tensor, y: Tensor, rows: Tensor | None) -> Any:
        """What losses of these examples are computed from, as the objective's ``losses`` take it.

        Args:
            x: natural inputs ``[n, ...]``.
            y: labels ``[n]``.
            rows: where the examples are in the training set, ``[n]``; ``None``: nothing is remembered of them.
        """

    def after(self, given: Any, losses: Tensor, share: float) -> None:
        """Takes note of what came of a batch.

        Args:
            given: from :meth:`before`.
            losses: ``[n]`` that the network is trained on, with their graph, which is kept.
            share: of the examples of the whole batch that these are, in (0, 1].
        """

    def step(self) -> None:
        """Does what follows once on a whole batch."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters whose learning rate follows that of the network."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on; plain containers and tensors."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""


@dataclass(frozen=True)
class GuideLogits:
    """The guide's prediction at the natural inputs of a batch.

    Attributes:
        logits: ``[n, K]`` with the guide's graph.
        values: the same numbers, behind which there is no graph: what a loss of the network is computed from.
    """

    logits: Tensor
    values: Tensor


class Guide:
    """The natural network of LBGAT, which learns beside the robust one (Cui et al., 2021).

    The guide is trained by the mean of the very losses that the robust network is trained on: its own cross-entropy,
    and the distance between the logits, which draws either network to the other. The gradient at the guide's logits is
    all that these losses tell the guide, so the two networks have backward passes of their own, and together they take
    the step that one optimizer over both takes, as in the authors' code. No weight of an example reaches the guide.

    Args:
        net: maps inputs to logits ``[n, K]``; it is used in training mode.
        optimizer: steps over the guide's parameters and no others.
        group: the processes that share every batch in equal parts, each with a copy of the guide, if there are several.

    Raises:
        ValueError: the optimizer does not hold the parameters of ``net``.
    """

    def __init__(
        self, net: nn.Module, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None
    ) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        if not held or held != {id(parameter) for parameter in self._trained}:
            raise ValueError("the optimizer of a guide must hold the trained parameters of the guide, and no others")
        self.net = net.train()
        self.optimizer = optimizer
        self._group = group
        # One piece of memory that stays where it is: a recorded step adds to it as well, and processes send it at once.
        sizes = [parameter.numel() for parameter in self._trained]
        self._gradient = self._trained[0].new_zeros(sum(sizes))
        for parameter, part in zip(self._trained, self._gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def before(self, x: Tensor, y: Tensor, rows: Tensor | None) -> GuideLogits:
        """The guide's logits at ``x``."""
        logits = self.net(x)
        return GuideLogits(logits, logits.detach().requires_grad_())

    def after(self, given: GuideLogits, losses: Tensor, share: float) -> None:
        """Adds the gradient of ``share`` times the mean of the losses to the guide's."""
        (towards,) = torch.autograd.grad(losses.mean() * share, given.values, retain_graph=True)
        found = torch.autograd.grad(given.logits, self._trained, towards, materialize_grads=True)
        self._gradient.add_(torch.cat([gradient.flatten() for gradient in found]))

    def step(self) -> None:
        """One step of the guide's optimizer, along the mean of the gradients of all processes."""
        if self._group is not None:
            dist.all_reduce(self._gradient, group=self._group)
            self._gradient.div_(self._group.size())
        self.optimizer.step()
        self._gradient.zero_()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the guide's optimizer."""
        return self.optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        """Weights, running statistics and the optimizer's state."""
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass
class SoftLabels:
    """The labels of a batch in self-adaptive training.

    Attributes:
        rows: where they are kept, ``[n]``; ``None``: nowhere.
        before: ``[n, K]`` as they were before this batch.
        group: the processes that share the batch, if there are several.
        after: ``[n, K]`` as the loss has moved them.
    """

    rows: Tensor | None
    before: Tensor
    group: dist.ProcessGroup | None = None
    after: Tensor | None = None


class LabelAverages:
    """The moving averages of labels and predictions of self-adaptive training, ``[N, K]`` (Huang et al., 2020).

    Each begins as its label, one-hot, and is moved whenever its example is trained on.

    Args:
        labels: of all training examples, ``[N]``.
        classes: number of classes ``K``.
        group: the processes that share every batch in equal parts, each with all averages, if there are several.

    Attributes:
        values: ``[N, K]``, in torch's default type.
    """

    def __init__(self, labels: Tensor, classes: int, group: dist.ProcessGroup | None = None) -> None:
        self.values = F.one_hot(labels, classes).to(torch.get_default_dtype())
        self._group = group

    def before(self, x: Tensor, y: Tensor, rows: Tensor | None) -> SoftLabels:
        """The present averages of a batch; of examples that are told by no row, their labels."""
        if rows is None:
            return SoftLabels(None, F.one_hot(y, self.values.shape[1]).to(self.values.dtype), self._group)
        return SoftLabels(rows, self.values[rows], self._group)

    def after(self, given: SoftLabels, losses: Tensor, share: float) -> None:
        """Keeps the averages that the loss has moved, those of all processes in each."""
        if given.rows is None or given.after is None:
            return
        rows, labels = given.rows, given.after.to(self.values.dtype)
        if self._group is not None:
            rows, labels = _of_all(self._group, rows), _of_all(self._group, labels)
        self.values.index_copy_(0, rows, labels)

    def step(self) -> None:
        """Nothing is left to do."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """None: nothing here has a gradient."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {"values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.values.copy_(state["values"])


def _of_all(group: dist.ProcessGroup, mine: Tensor) -> Tensor:
    """The rows of all processes, each of which has as many."""
    found = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(found, mine.contiguous(), group=group)
    return torch.cat(found)
