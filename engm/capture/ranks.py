"""Among which processes does a captured forward pass run?"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from ..distributed import Ranks
from ..torch_internals import joins, running_data_parallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def active_ranks(shards: ProcessGroup | None = None) -> Ranks | None:
    """The processes of the ``DistributedDataParallel`` whose forward pass is running, if one is; else ``shards``.

    Args:
        shards: the processes that ``fully_shard`` split the network over, if it did.

    Raises:
        RuntimeError: ``DistributedDataParallel`` takes the graph to be static, and the backward pass that measures
            would use up its one look.
    """
    active = running_data_parallel()
    if active is None:
        return None if shards is None else Ranks(shards)
    if active.static_graph:
        raise RuntimeError(
            "DistributedDataParallel(static_graph=True) would leave the gradients unreduced: it prepares for the first "
            "backward pass it sees, and that is the one that measures norms. Leave static_graph out."
        )
    return Ranks(active.process_group, active.require_backward_grad_sync, joins(active), weakref.ref(active))
