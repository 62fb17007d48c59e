"""Which batch size pays? The gradient noise scale in the course of training, from every example's gradient norm.

For gradients g of examples, B_simple = tr(cov(g)) / |E g|^2 (McCandlish et al. 2018, Eq. 2.9). Both terms have unbiased
estimates from the norms of a batch's gradients and the norm of their mean; single ones are noisy, so running means of
them are divided.

python examples/noise_scale.py [PICTURE.svg]
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import engm
from engm.recipes.pictures import picture

STEPS, BATCH, KEPT = 400, 64, 0.98  # KEPT: share of the old running mean in the new one
LOOKS = 50  # steps between two looks at all examples, to see whether the estimate is right


def terms(norms: Tensor, gradients: Iterable[Tensor]) -> tuple[float, float]:
    """Estimates of tr(cov(g)) and |E g|^2, from the examples' norms ``[n]`` and the gradients of their mean loss."""
    n, each = len(norms), norms.double().square().mean().item()
    mean = sum(g.double().square().sum().item() for g in gradients)
    return n / (n - 1) * (each - mean), (n * mean - each) / (n - 1)


def train(steps: int = STEPS) -> tuple[list[float], list[float], dict[int, float]]:
    """The loss and the noise scale at every step, and what it is over all examples every ``LOOKS`` steps."""
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model = engm.GradNormModule(net)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    opt = engm.ENGM(model, sgd, alpha=float("inf"))  # clips nothing: plain SGD, and the norms beside
    curve, scale, exact = [], [], {}
    trace = signal = 0.0
    for step in range(steps):
        if step % LOOKS == 0:
            losses = F.cross_entropy(model(x), y, reduction="none")
            each = engm.per_example_grad_norms(model, losses).square().mean().item()
            whole = torch.autograd.grad(losses.mean(), list(model.parameters()))
            mean = sum(g.square().sum().item() for g in whole)
            exact[step] = (each - mean) / mean
        rows = torch.randint(len(y), (BATCH,))
        stats = opt.backward(F.cross_entropy(model(x[rows]), y[rows], reduction="none"))
        latest = terms(stats.norms, (p.grad for p in model.parameters()))
        trace, signal = (KEPT * old + (1 - KEPT) * new for old, new in zip((trace, signal), latest, strict=True))
        curve.append(stats.losses.mean().item())
        scale.append(trace / signal)
        opt.step()
        opt.zero_grad()
    return curve, scale, exact


def main(out: Path | None = None) -> None:
    """Prints the noise scale at the looks, and draws it."""
    curve, scale, exact = train()
    for step, whole in exact.items():
        print(f"step {step:4d}  loss {curve[step]:.3f}  noise scale {scale[step]:7.1f} examples, of all {whole:7.1f}")
    if out is not None:
        with picture(out, (5.5, 4.4)) as figure:
            loss, noise = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2])
            loss.plot(curve, color="#0072B2", linewidth=0.8)
            loss.set_ylabel("training loss, nats")
            noise.plot([s if s > 0 else float("nan") for s in scale], color="#D55E00", label=f"from batches of {BATCH}")
            noise.plot(list(exact), list(exact.values()), "ko", label="from all 1,797 examples")
            noise.axhline(BATCH, color="grey", linestyle=":", label="the batch size")
            noise.set(xlabel="step", ylabel="gradient noise scale, examples")
            figure.legend(loc="outside lower center", ncols=3)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
