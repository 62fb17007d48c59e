"""What is refused of a graph, in words that say what to do."""

from __future__ import annotations

from ..capture.calls import Wrapper
from ..checks import RefusedError
from ..torch_internals import is_compiled_region, node_name, own_parameters
from .trace import Trace


def refuse_hidden_layers(traced: Trace) -> None:
    """No part of the graph may hide the layers inside.

    Raises:
        RuntimeError: names what hides them.
    """
    hidden = [name for name in map(node_name, traced.order) if name.startswith("CheckpointFunction")]
    if hidden:
        raise RefusedError(
            f"engm: the losses run through {hidden[0]}, torch.utils.checkpoint with use_reentrant=True, which hides "
            "the layers inside from the graph. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )


def check_parameters(traced: Trace) -> None:
    """The graph must be of the model's own parameters. A parameter that was replaced since has a gradient of 0.

    Raises:
        RuntimeError: the forward pass ran with other tensors in the place of all of them.
    """
    if any(id(parameter) in traced.leaves for _, parameter in traced.trained):
        return
    used = [(call, key, p) for call in traced.own for key, p in call.parameters.items() if p.requires_grad]
    if not traced.trained or not used:
        return
    call, key, parameter = used[0]
    if own_parameters(call.module).get(key) is not parameter:
        name = f"{call.name}.{key}" if call.name else key
        raise RefusedError(
            f"engm: the forward pass behind these losses ran with other tensors than the model's parameters, such as "
            f"'{name}' (torch.func.functional_call, or they were replaced since), and norms are taken over the model's "
            "own. Copy the values into them, or run the forward pass again."
        )


def refuse_coupling(model: Wrapper, traced: Trace, number: int, position: int | None = None) -> None:
    """Examples influence each other's losses: raises unless the gradients of all are to be taken through that.

    Args:
        model: the wrapper, which says so.
        traced: the graph.
        number: of the call nearest to the losses whose output several examples have a share in; -1: an input.
        position: of the node at which the examples meet.

    Raises:
        RuntimeError: names the layer and the node.
    """
    region = position is not None and is_compiled_region(traced.order[position])
    if model.coupled == "exact" and not region:
        return
    call = traced.calls[number] if number >= 0 else None
    what = (
        "an input that requires grad"
        if call is None
        else (f"the output of layer '{call.name}' ({type(call.module).__name__})")
    )
    where = "" if position is None else f" They meet in {node_name(traced.order[position])}"
    if region:  # takes no example's gradient apart
        where += (
            ", a region made by torch.compile: leave what mixes them uncompiled (torch.compiler.disable) to be "
            "told which operator it is, and for coupled='exact'"
        )
    where += "." if where else ""
    raise RefusedError(
        f"engm: {what} for some examples influences the losses of other examples, so that a loss is not its own "
        f"example's alone.{where} Something between this layer and the losses mixes the batch (x - x.mean(0), a "
        "batch statistic outside nn.BatchNorm or over a part of the batch, losses of pairs, a gradient clipped by "
        "its norm over the batch in a hook or a torch.autograd.Function). Replace it, or wrap with "
        "GradNormModule(net, coupled='exact'), which takes the gradients of all losses through it: right, and as "
        "slow as one backpropagation an example from there on. Rows that are no example's but shared by all, as "
        "prompts or class names, count for the examples' if there are n, or a multiple: make them a buffer of the "
        "network."
    )


def refuse_lost_in_regions(names: set[str]) -> None:
    """No compiled region may use parameters beside its layers, where nobody sees them.

    Args:
        names: of such parameters.

    Raises:
        RuntimeError: there are some.
    """
    if not names:
        return
    shown = ", ".join(f"'{name}'" for name in sorted(names)[:5])
    raise RefusedError(
        f"engm: a region made by torch.compile uses {shown} outside of layer calls that were captured, so their "
        "per-example gradients cannot be seen. If the network was compiled and called before it was wrapped, call "
        "torch.compiler.reset() once. If these parameters are used directly (a class token, "
        "F.linear(x, layer.weight), a table of positions, a layer without a rule, a branch of torch.cond), leave that "
        "part uncompiled with torch.compiler.disable, or freeze them."
    )
