"""Can all ranks take this step?

A rank that refuses its batch (a loss that is not finite, no example, inputs that do not fit) must not leave the others
waiting for its gradients. So before a step sends anything the ranks tell one another whether they can go on, in one
all-reduce of one number, and where one cannot, all of them raise its error. They do so again when they have their
weights, which the user's own code may have made, before gradients are reduced.

Nothing is sent where nothing is distributed; on CUDA without ``check=True``, since the host would wait for the answer;
inside ``join()``, where ranks without batches answer the reduction of gradients alone; and under ``no_sync``, where the
ranks may have unequally many micro-batches, unless the step estimates something from the batch of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..capture.layers import named_modules
from ..checks import NonFiniteError, RefusedError
from ..distributed import Ranks, fewest, told_by
from ..graph.trace import Trace, trace
from ..module import GradNormModule
from .batch import LossBatch

T = TypeVar("T")
# The first that fits.
KINDS = {kind.__name__: kind for kind in (NonFiniteError, RefusedError, TypeError, ValueError, RuntimeError)}


def in_processes() -> bool:
    """Whether this process is one of several that may work together."""
    return dist.is_available() and dist.is_initialized()


class Agreement:
    """Lets the ranks of one step all go on or all stop.

    Args:
        model: the wrapper.
        losses: of this rank.
        latest: the ranks of the step before, which are asked where the losses are too wrong to tell theirs.
        check: whether the user asked for checks; None: on the CPU only.
        estimates: whether the weights of this step are estimated from the batch of all ranks.
    """

    def __init__(
        self,
        model: GradNormModule,
        losses: Tensor,
        *,
        latest: Ranks | None,
        check: bool | None,
        estimates: bool,
    ) -> None:
        self.model = model
        self.losses = losses
        self.latest = latest
        self.check = check
        self.estimates = estimates

    @property
    def passes_are_shared(self) -> bool:
        """Whether a backward pass that measures is one of all ranks: parameters or batch statistics are split."""
        if self.model.shard_group is not None:
            return True
        return any(isinstance(module, nn.SyncBatchNorm) for _, module in named_modules(self.model.unwrap()))

    def reached(self, work: Callable[[], T], traced: Trace | None = None) -> T:
        """What ``work()`` returns, once all ranks have done theirs.

        Args:
            work: whatever may fail on one rank alone.
            traced: the graph, where it is known.

        Raises:
            TypeError, ValueError, RuntimeError: that of the first rank whose work failed, which the message names.
        """
        try:
            result = work()
        except Exception as error:  # whatever it is, the others have to learn of it
            self._settle(traced, error)
            raise
        self._settle(result.trace if isinstance(result, LossBatch) else traced or self._traced, None)
        return result

    def _settle(self, traced: Trace | None, error: Exception | None) -> None:
        """Tells the other ranks, if any wait to hear it, whether this one can go on; raises if one cannot."""
        ranks = self._asked(traced)
        if ranks is None:
            return
        rank, size = ranks.group.rank(), ranks.group.size()
        first = fewest(ranks.group, size if error is None else rank, self._device)
        if first < size:
            said = None if error is None else (_kind(error), str(error))
            kind, text = told_by(ranks.group, first, said)
            raise KINDS[kind](f"on rank {first} of {size}, which stops all of them: {text}") from error

    @cached_property
    def _traced(self) -> Trace:
        """The graph, read once more, for the ranks behind losses that could not be planned."""
        return trace(self.losses, self.model) if isinstance(self.losses, Tensor) else Trace()

    @property
    def _device(self) -> torch.device:
        if isinstance(self.losses, Tensor):
            return self.losses.device
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def _asked(self, traced: Trace | None) -> Ranks | None:
        """The ranks that wait for this one's word; None where none do. ``traced`` is None where the work failed."""
        if self._device.type != "cpu" and not self.check:
            return None
        if self.model.shard_group is not None:
            return Ranks(self.model.shard_group)
        failed, traced = traced is None, self._traced if traced is None else traced
        ranks = self.latest if failed and not traced.own_captures else traced.ranks
        if ranks is None or ranks.joining or ranks.group.size() == 1:
            return None
        return ranks if ranks.reduces or self.estimates else None


def _kind(error: Exception) -> str:
    return next((name for name, kind in KINDS.items() if isinstance(error, kind)), RuntimeError.__name__)
