"""Whole plain steps of others that clip every example's gradient exactly, to the threshold of ``workloads.engm_step``.

Each maker takes ``(net, x, y)`` and returns a step. What a peer cannot do is an error when it is made or takes its
first step, so that a benchmark can say why it has no figure: see ``interleaved.runnable``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib import metadata

import torch
import torch.nn.functional as F
import workloads
from torch import Tensor, nn

ALPHA = 1.0


class NotInstallableError(ImportError):
    """A peer that no package index has."""


def weights_of(squared_norms: Sequence[Tensor]) -> Tensor:
    """``min(alpha / norm, 1)``, ``[n]``, from the squared norms of every parameter."""
    return (ALPHA / torch.stack(list(squared_norms)).sum(0).sqrt()).clamp(max=1)


def weighted_means(gradients: Sequence[Tensor]) -> list[Tensor]:
    """``1/n sum_i w_i g_i`` of every parameter, from per-example gradients ``[n, *shape]``."""
    weights = weights_of([g.flatten(1).square().sum(1) for g in gradients])
    return [torch.tensordot(weights / len(weights), g, 1) for g in gradients]


def vmap_grad(net: nn.Module, x: Tensor, y: Tensor) -> workloads.Step:
    """``torch.func``: the gradient of one example's loss, vectorised over the batch."""
    model = copy.deepcopy(net)
    optimizer = workloads.sgd(model)
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (values, buffers), (image[None],))
        return F.cross_entropy(logits, label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def step() -> None:
        found = gradients({name: p.detach() for name, p in parameters.items()}, x, y)
        for p, mean in zip(parameters.values(), weighted_means([found[name] for name in parameters]), strict=True):
            p.grad = mean
        optimizer.step()
        optimizer.zero_grad()

    return step


def backpack_grads(net: nn.Module, x: Tensor, y: Tensor) -> workloads.Step:
    """BackPACK's ``BatchGrad``: every example's gradient out of one backward pass, then clipped and added up."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model = extend(copy.deepcopy(net))
    optimizer, parameters = workloads.sgd(model), list(model.parameters())

    def step() -> None:
        with backpack(BatchGrad()):
            workloads.losses_of(model, x, y).sum().backward()
        means = weighted_means(_backpacked(model, "grad_batch"))
        for p, mean in zip(parameters, means, strict=True):
            p.grad = mean
            del p.grad_batch
        optimizer.step()
        optimizer.zero_grad()

    return step


def backpack_norms(net: nn.Module, x: Tensor, y: Tensor) -> workloads.Step:
    """BackPACK's ``BatchL2Grad``: squared norms out of one backward pass, then another of the reweighted losses."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model = extend(copy.deepcopy(net))
    optimizer = workloads.sgd(model)

    def step() -> None:
        losses = workloads.losses_of(model, x, y)
        with backpack(BatchL2Grad(), retain_graph=True):
            losses.sum().backward(retain_graph=True)
        weights = weights_of(_backpacked(model, "batch_l2"))
        optimizer.zero_grad()
        (losses * weights).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _backpacked(model: nn.Module, attribute: str) -> list[Tensor]:
    """What BackPACK left on the parameters.

    Raises:
        RuntimeError: parameters were left out; BackPACK passes over layers that it does not know without a word.
    """
    missing = [name for name, p in model.named_parameters() if not hasattr(p, attribute)]
    if missing:
        owner = model.get_submodule(missing[0].rpartition(".")[0])
        raise RuntimeError(
            f"BackPACK leaves out {len(missing)} parameters, {missing[0]} of {type(owner).__name__} first"
        )
    return [getattr(p, attribute) for p in model.parameters()]


def fast_dp(net: nn.Module, x: Tensor, y: Tensor) -> workloads.Step:
    """FastDP's mixed ghost clipping with book-keeping (``MixOpt``), noise 0."""
    try:
        from fastDP import PrivacyEngine
    except ModuleNotFoundError as error:
        if error.name != "fastDP":
            raise
        raise NotInstallableError(
            "not installable: the package index has neither fastDP nor private-vision; measured if the repository "
            "awslabs/fast-differential-privacy and transformers are on the path"
        ) from None
    model = copy.deepcopy(net)
    optimizer = workloads.sgd(model)
    engine = PrivacyEngine(
        model, batch_size=len(y), sample_size=1000 * len(y), epochs=1, noise_multiplier=0.0, max_grad_norm=ALPHA,
        clipping_mode="MixOpt", clipping_fn="Abadi", clipping_style="all-layer", loss_reduction="mean",
    )  # fmt: skip
    engine.attach(optimizer)
    left_out = len(list(net.parameters())) - engine.n_components
    if left_out:
        raise RuntimeError(f"FastDP freezes {left_out} parameters, of layers that it does not know")

    def step() -> None:
        workloads.losses_of(model, x, y).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


PEERS: dict[str, Callable[[nn.Module, Tensor, Tensor], workloads.Step]] = {
    "Opacus ghost": workloads.opacus_ghost,
    "BackPACK BatchL2Grad": backpack_norms,
    "BackPACK BatchGrad": backpack_grads,
    "torch.func vmap(grad)": vmap_grad,
    "FastDP MixOpt": fast_dp,
}


def versions() -> dict[str, str | None]:
    """Versions of the distributions behind the peers; None where one is not installed."""
    found: dict[str, str | None] = {}
    for name in ("opacus", "backpack-for-pytorch", "fastDP"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
