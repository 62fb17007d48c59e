"""Which labels are wrong? A tenth of the labels of the digits is changed, and two scores of every example rank them.

python examples/mislabelled.py [PICTURE.svg]
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, precision_recall_curve
from torch import Tensor, nn

import engm
from engm.recipes.pictures import picture

SEEDS, CHANGED, STEPS, BATCH = 5, 0.1, 120, 64  # 120 steps are four passes over the data


def scores(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Which labels are wrong, ``[n]``, and by what the examples are ranked after a brief training, ``[n]`` each."""
    torch.manual_seed(seed)
    digits = load_digits()
    x, true = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    wrong = torch.rand(len(true)) < CHANGED
    labels = torch.where(wrong, (true + torch.randint(1, 10, true.shape)) % 10, true)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        rows = torch.randint(len(labels), (BATCH,))
        F.cross_entropy(net(x[rows]), labels[rows]).backward()
        sgd.step()
        sgd.zero_grad()
    model = engm.GradNormModule(net)  # nothing of it is needed before
    losses = F.cross_entropy(model(x), labels, reduction="none")
    return wrong, {"gradient norm": engm.per_example_grad_norms(model, losses), "loss": losses.detach()}


def main(out: Path | None = None) -> dict[str, list[float]]:
    """Prints the average precision of both rankings over the seeds, returns it, and draws their curves."""
    recall = np.linspace(0.01, 1, 100)
    curves: dict[str, list[np.ndarray]] = {}
    found: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        wrong, ranked_by = scores(seed)
        for name, score in ranked_by.items():
            precision, at, _ = precision_recall_curve(wrong, score)
            curves.setdefault(name, []).append(np.interp(recall, at[::-1], precision[::-1]))
            found.setdefault(name, []).append(float(average_precision_score(wrong, score)))
    for name, values in found.items():
        print(f"{name:14} average precision {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}")
    if out is not None:
        with picture(out, (5.5, 3.4)) as figure:
            axes = figure.subplots()
            for (name, several), style, colour in zip(curves.items(), ("-", "--"), ("#D55E00", "k"), strict=True):
                mean, deviation = np.mean(several, 0), np.std(several, 0, ddof=1)
                axes.plot(recall, mean, style, color=colour, label=f"by {name}")
                axes.fill_between(recall, mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0)
            axes.axhline(CHANGED, color="grey", linestyle=":", label="by chance")
            axes.set(xlabel="share of the wrong labels that are found", ylabel="share of wrong labels in what is shown")
            axes.set(xlim=(0, 1), ylim=(0, 1.02))
            figure.legend(loc="outside lower center", ncols=3)
    return found


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
