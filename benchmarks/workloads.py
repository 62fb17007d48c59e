"""The training steps that are compared: the same network, data and inner optimizer under every contender."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engm
from engm.adversarial import PGD
from engm.recipes.models.resnet import resnet18

Step = Callable[[], object]


def vgg(width: int, norm: str) -> nn.Module:
    """A VGG-like stack for 32x32 images: 1, 2, 4, 8, 8 times ``width`` channels, a pooling after each but the first."""
    layers: list[nn.Module] = []
    channels = 3
    for position, factor in enumerate((1, 2, 4, 8, 8)):
        out = factor * width
        layers.append(nn.Conv2d(channels, out, 3, padding=1, bias=False))
        layers.append(nn.BatchNorm2d(out) if norm == "batch" else nn.GroupNorm(8, out))
        layers.append(nn.ReLU())  # in-place ReLUs break the module backward hooks of Opacus
        if position:
            layers.append(nn.MaxPool2d(2))
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def network(name: str, width: int, norm: str) -> nn.Module:
    """``"resnet18"`` or ``"vgg"`` with batch or group norm."""
    torch.manual_seed(0)
    return resnet18(width=width, norm=norm) if name == "resnet18" else vgg(width, norm)


def batch(n: int, side: int = 32) -> tuple[Tensor, Tensor]:
    """Random images ``[n, 3, side, side]`` in [0, 1] and labels; time does not depend on what they show."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, side, side, generator=generator), torch.randint(10, (n,), generator=generator)


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, ``[n]``."""
    return F.cross_entropy(model(x), y, reduction="none")


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The paper's inner optimizer; the tiny step keeps the network where it is while it is timed."""
    return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)


def plain_sgd(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """A training step of SGD, the reference: no engm anywhere."""
    net = copy.deepcopy(net)
    optimizer = sgd(net)

    def step() -> None:
        losses_of(net, x, y).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def engm_step(net: nn.Module, x: Tensor, y: Tensor, method: str, **options: object) -> Step:
    """A step of one of engm's optimizers, by the names of ``outer``.

    Only the first step calibrates; ``calibrating`` is for timing those that do.
    """
    model = engm.GradNormModule(copy.deepcopy(net), calibrate_every=10**9, **options)
    opt = outer(model, method)

    def step() -> None:
        opt.backward(losses_of(model, x, y), inputs=x)
        opt.step()
        opt.zero_grad()

    return step


def outer(model: engm.GradNormModule, method: str, *, tau: int = 10**9) -> engm.ExampleOptimizer:
    """An outer optimizer by name; A-ENGM regresses every ``tau`` steps."""
    inner = sgd(model)
    makers: dict[str, Callable[[], engm.ExampleOptimizer]] = {
        "msgd": lambda: engm.MSGD(model, inner),
        "gnc": lambda: engm.GNC(model, inner),
        "sngm": lambda: engm.SNGM(model, inner),
        "fengm": lambda: engm.FENGM(model, inner),
        "nengm": lambda: engm.NENGM(model, inner, alpha=0.05),
        "aengm": lambda: engm.AENGM(model, inner, alpha=1.0, tau=tau),
        "engm": lambda: engm.ENGM(model, inner, alpha=1.0),
    }
    return makers[method]()


def naively_reweighted(net: nn.Module, losses: Tensor) -> Tensor:
    """``w_i L_i``, ``[n]``, with norms as the paper takes them: one backpropagation an example over one graph."""
    parameters = list(net.parameters())
    gradients = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses.unbind())
    norms = torch.stack([torch.stack(torch._foreach_norm(found)).norm() for found in gradients])
    return losses * (1.0 / norms).clamp(max=1)


def naive_engm(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """The paper's ENGM: naive norms, then the backward pass of the reweighted losses."""
    net = copy.deepcopy(net)
    optimizer = sgd(net)

    def step() -> None:
        naively_reweighted(net, losses_of(net, x, y)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def opacus_ghost(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Opacus' ghost clipping without noise (grad_sample_mode "ghost"); it refuses batch norm."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    model = GradSampleModuleFastGradientClipping(copy.deepcopy(net), max_grad_norm=1.0, use_ghost_clipping=True)
    optimizer = DPOptimizerFastGradientClipping(
        sgd(model), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=len(y), loss_reduction="mean"
    )
    criterion = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss(reduction="mean"))

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return step


def attack_of(steps: int, *, eval_mode: bool = True) -> PGD:
    """The paper's attack: radius 8/255, step 2/255."""
    return PGD(eps=8 / 255, step_size=2 / 255, steps=steps, eval_mode=eval_mode)


def pgd_step(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    method: str,
    *,
    borrowed: bool,
    rare: bool = False,
    attack_steps: int = 10,
) -> Step:
    """A whole adversarial step: PGD, then one of engm's optimizers with borrowed norms or a pass of its own.

    With ``rare`` every step calibrates, and A-ENGM regresses, as otherwise only the first does.
    """
    model = engm.GradNormModule(copy.deepcopy(net), calibrate_every=10**9)
    model.calibration.most_error = inf  # borrowed norms are timed whatever these images would have them judged
    opt = outer(model, method, tau=1 if rare else 10**9)
    attack = attack_of(attack_steps)
    generator = torch.Generator(x.device).manual_seed(0)
    measured = opt if borrowed else False

    def step() -> None:
        if rare:
            model.calibration.forget()
        found = attack(model, x, y, generator=generator, measure=measured)
        opt.backward(losses_of(model, found.inputs, y), inputs=found.inputs, measurement=found.measurement)
        opt.step()
        opt.zero_grad()

    return step


def recorded_step(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    method: str,
    *,
    backend: str | None,
    attack_steps: int = 0,
    borrowed: bool = True,
) -> Step:
    """A step of one of engm's optimizers, adversarial if it has an attack, run by a backend.

    Args:
        net: the network; a copy is trained.
        x: images.
        y: labels.
        method: a name of ``outer``.
        backend: a backend of ``engm.record``; None for steps by hand.
        attack_steps: of PGD; 0 for plain steps.
        borrowed: whether the attack's last step measures the norms.

    Raises:
        RuntimeError: the step is not run by the backend; the message says why.
    """
    model = engm.GradNormModule(copy.deepcopy(net), calibrate_every=10**9, check_every=10**9)
    model.calibration.most_error = inf  # as in pgd_step
    opt = outer(model, method)
    attack = attack_of(attack_steps) if attack_steps else None

    def losses(x: Tensor, y: Tensor) -> tuple[Tensor, engm.Measurement | None]:
        if attack is None:
            return losses_of(model, x, y), None
        found = attack(model, x, y, measure=opt if borrowed else False)
        return losses_of(model, found.inputs, y), found.measurement

    recorded = None if backend is None else engm.record(opt, losses, backend=backend)

    def step() -> None:
        if recorded is not None:
            recorded(x, y)
        else:
            found, measurement = losses(x, y)
            opt.backward(found, measurement=measurement)
        opt.step()
        opt.zero_grad()

    for _ in range(5):  # calibrated, recorded, and replayed
        step()
    if recorded is not None and not recorded.report().replayed:
        raise RuntimeError(f"not run by {backend}: {recorded.report()}")
    return step


def bare(net: nn.Module, x: Tensor, y: Tensor, attack_steps: int, *, naive: bool = False) -> Step:
    """A whole adversarial step without engm: PGD, then momentum SGD or the paper's one backpropagation an example."""
    net = copy.deepcopy(net)
    optimizer, attack = sgd(net), attack_of(attack_steps)
    generator = torch.Generator(x.device).manual_seed(0)

    def step() -> None:
        losses = losses_of(net, attack(net, x, y, generator=generator).inputs, y)
        if naive:
            losses = naively_reweighted(net, losses)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def calibrating(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """A step of ENGM that calibrates every time, with the exact gradients of 16 examples through the training graph."""
    model = engm.GradNormModule(copy.deepcopy(net))
    opt = outer(model, "engm")

    def step() -> None:
        model.calibration.forget()
        opt.backward(losses_of(model, x, y))
        opt.step()
        opt.zero_grad()

    return step
