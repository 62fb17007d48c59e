"""Per-example clipping without noise, in Opacus (ghost clipping) and in engm: the same training, step by step.

python examples/from_opacus.py
"""

import copy
import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import engm

MAX_GRAD_NORM = 3.0
BATCH = 64

Steps = list[tuple[Tensor, list[Tensor]]]


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def with_opacus(net: nn.Module, loader: DataLoader, max_grad_norm: float) -> Steps:
    """Trains ``net`` for an epoch; returns every step's norms and the clipped mean gradient that the optimizer took."""
    model, opt, criterion, loader = PrivacyEngine().make_private(
        module=net,
        optimizer=sgd(net),
        data_loader=loader,
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        grad_sample_mode="ghost",
        poisson_sampling=False,
    )
    steps = []
    for x, y in loader:
        opt.zero_grad()
        criterion(model(x), y).backward()
        opt.step()
        steps.append((model.per_sample_gradient_norms.clone(), [p.grad.clone() for p in net.parameters()]))
    return steps


def with_engm(net: nn.Module, loader: DataLoader, max_grad_norm: float, **options: Any) -> Steps:
    """Trains and returns the same with engm; ``options`` are those of :class:`engm.ENGM`."""
    model = engm.GradNormModule(net)
    opt = engm.ENGM(model, sgd(net), alpha=max_grad_norm, **options)
    steps = []
    for x, y in loader:
        opt.zero_grad()
        stats = opt.backward(F.cross_entropy(model(x), y, reduction="none"), divisor=loader.batch_size)
        opt.step()
        steps.append((stats.norms, [p.grad.clone() for p in net.parameters()]))
    return steps


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip


def main() -> None:
    warnings.filterwarnings("ignore", "Secure RNG turned off")
    warnings.filterwarnings("ignore", "Full backward hook")
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images[:, None] / 16, dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, torch.tensor(digits.target)), batch_size=BATCH, drop_last=True)
    net = network().double()
    found, seconds = {}, {}
    for name, train in {"opacus": with_opacus, "engm": with_engm}.items():
        started = time.perf_counter()
        found[name] = train(copy.deepcopy(net), loader, MAX_GRAD_NORM)
        seconds[name] = time.perf_counter() - started
    for step, ((norms, gradient), (other_norms, other)) in enumerate(zip(found["opacus"], found["engm"], strict=True)):
        if step % 5 == 0:
            apart = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(gradient, other, strict=True))
            clipped = (norms > MAX_GRAD_NORM).double().mean()
            norms_apart = ((norms - other_norms).abs() / norms).max()
            print(f"step {step:2d}  clipped {clipped:4.0%}  norms differ by {norms_apart:.0e}, gradient by {apart:.0e}")
    print(f"the epoch took Opacus {seconds['opacus']:.2f} s, engm {seconds['engm']:.2f} s")


if __name__ == "__main__":
    main()
