"""Which parameters lie outside of the wrapped network and would quietly go untrained?

A head that the wrapper does not hold has no share in the norms, and ``backward`` gives gradients to the wrapper's
parameters alone. With the head in the same optimizer nothing would show that it stays as it was made.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..capture.sharded import sharded_parts
from ..graph.trace import Trace
from ..module import GradNormModule

WHAT_TO_DO = (
    "Put the layers that they belong to inside the wrapper, engm.GradNormModule(nn.Sequential(net, head)); or give "
    "them an optimizer of their own and use opt.reweight(losses).mean().backward(), whose gradient reaches them, "
    "unclipped by their own share."
)
NAMED = 5  # of the parameters in a message


def refuse_parameters_outside(model: GradNormModule, groups: Sequence[dict[str, Any]], first: int = 0) -> None:
    """Refuses trained parameters of an optimizer that are not the model's.

    Parameters that are frozen may come from anywhere, and the model may have others than the optimizer.

    Args:
        model: the wrapper.
        groups: parameter groups of the optimizer.
        first: the number of the first of these groups.

    Raises:
        ValueError: names the parameters, and says what to do.
    """
    if model.shard_group is not None:
        for _, part in sharded_parts(model.unwrap()):
            part.reshard()  # so that its parameters are the shards, which the optimizer has, and not whole copies
    known = {id(parameter) for parameter in model.parameters()}
    strange = [entry for entry in _named(groups, first) if entry[1].requires_grad and id(entry[1]) not in known]
    if strange:
        raise ValueError(
            f"the optimizer holds {_counted(strange)} that the wrapped model does not: {_listed(strange)}. "
            f"opt.backward would give them no gradient. {WHAT_TO_DO} If they were the model's once, make the optimizer "
            "after the model has got its parameters."
        )


class OutsideWatch:
    """Looks at every step's graph for trained parameters outside of the model; warns once of those nobody refuses."""

    def __init__(self) -> None:
        self._warned = False

    def look(self, traced: Trace, model: GradNormModule, groups: Sequence[dict[str, Any]], *, one_pass: bool) -> None:
        """Refuses parameters of the optimizer that the losses reach outside of the model, and warns of others.

        Args:
            traced: the graph behind the losses.
            model: the wrapper.
            groups: parameter groups of the optimizer.
            one_pass: whether ``backward`` is running, which gives others than the model's parameters no gradient.

        Raises:
            RuntimeError: names the parameters, and says what to do.
        """
        beside = traced.leaves.keys() - {id(parameter) for _, parameter in traced.trained}
        if beside:  # inputs that require grad are beside the model as well
            held = {id(parameter) for group in groups for parameter in group["params"]}
            beside = {key for key in beside if key in held or _is_trained(traced.leaves[key])}
        if not beside:
            return
        beside -= {id(parameter) for parameter in model.parameters()}
        strange = [entry for entry in _named(groups) if id(entry[1]) in beside and entry[1].requires_grad]
        if strange:
            raise RuntimeError(
                f"the losses reach {_counted(strange)} of the optimizer that the wrapped model does not hold: "
                f"{_listed(strange)}. opt.backward would give them no gradient. {WHAT_TO_DO}"
            )
        if one_pass and not self._warned:
            others = [leaf for key, leaf in traced.leaves.items() if key in beside and _is_trained(leaf)]
            if others:
                self._warned = True
                shapes = ", ".join(str(tuple(leaf.shape)) for leaf in others[:NAMED])
                warnings.warn(
                    f"the losses reach {len(others)} trained parameter(s) outside of the wrapped model, of shape(s) "
                    f"{shapes}, and opt.backward gives them no gradient. {WHAT_TO_DO} Freeze them if they are not to "
                    "be trained. (This is said once.)",
                    stacklevel=5,
                )


def _is_trained(leaf: Tensor) -> bool:
    return isinstance(leaf, nn.Parameter) and leaf.requires_grad


def _named(groups: Iterable[dict[str, Any]], first: int = 0) -> list[tuple[str, Tensor]]:
    """Every parameter with what can be said of the place where it is."""
    found = []
    for number, group in enumerate(groups, first):
        names = group.get("param_names")  # of an optimizer that was made from named_parameters()
        for index, parameter in enumerate(group["params"]):
            place = f"param_groups[{number}]['params'][{index}]"
            found.append((f"'{names[index]}' ({place})" if names else place, parameter))
    return found


def _counted(entries: Sequence[tuple[str, Tensor]]) -> str:
    return "1 trained parameter" if len(entries) == 1 else f"{len(entries)} trained parameters"


def _listed(entries: Sequence[tuple[str, Tensor]]) -> str:
    shown = ", ".join(f"{place} of shape {_shape(parameter)}" for place, parameter in entries[:NAMED])
    return shown + (" and more" if len(entries) > NAMED else "")


def _shape(parameter: Tensor) -> str:
    if isinstance(parameter, nn.UninitializedParameter):
        return "not known yet"
    return str(tuple(parameter.shape))
