"""What a graph must not hide: it is of the model's own parameters, and every one of them is in sight.

None of this needs a look at gradients, so it is checked without ``strict`` too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .graph import Trace

if TYPE_CHECKING:
    from .module import GradNormModule


def check_reach(traced: Trace) -> None:
    """No part of the graph may hide the layers inside.

    Raises:
        RuntimeError: names what hides them.
    """
    hidden = [node.name() for node in traced.order if node.name().startswith("CheckpointFunction")]
    if hidden:
        raise RuntimeError(
            f"engm: the losses run through {hidden[0]}, torch.utils.checkpoint with use_reentrant=True, which hides "
            "the layers inside from the graph. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )


def check_parameters(model: GradNormModule, traced: Trace) -> None:
    """The graph must be of the model's own parameters. One that was replaced since has a gradient of 0, as in torch.

    Raises:
        RuntimeError: the forward pass ran with other tensors in the place of all of them.
    """
    if any(id(parameter) in traced.leaves for _, parameter in traced.trained):
        return
    calls = [call for call in traced.calls if call.capture.owner is model]
    used = [(call, key, p) for call in calls for key, p in call.parameters.items() if p.requires_grad]
    if not traced.trained or not used:
        return
    call, key, parameter = used[0]
    if call.module._parameters.get(key) is not parameter:
        name = f"{call.name}.{key}" if call.name else key
        raise RuntimeError(
            f"engm: the forward pass behind these losses ran with other tensors than the model's parameters, such as "
            f"'{name}' (torch.func.functional_call, or they were replaced since), and norms are taken over the model's "
            "own. Copy the values into them, or run the forward pass again."
        )


def region_message(shown: str) -> str:
    """What to say of parameters that a compiled region uses beside its layers."""
    return (
        f"engm: a region made by torch.compile uses {shown} outside of layer calls that were captured, so their "
        "per-example gradients cannot be seen. If the network was compiled and called before it was wrapped, call "
        "torch.compiler.reset() once. If these parameters are used directly (a class token, "
        "F.linear(x, layer.weight), a table of positions, a layer without a rule), leave that part uncompiled with "
        "torch.compiler.disable, or freeze them."
    )
