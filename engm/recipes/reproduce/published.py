"""What the paper prints (Dabouei et al., Revisiting Outer Optimization in Adversarial Training, ECCV 2022).

Accuracies and overfit in per cent. Figures 2 to 5 print curves without numbers, so nothing of them is here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracies:
    """A row of the paper's tables, per cent; ``None`` where it prints nothing.

    Attributes:
        natural: accuracy on clean images, of the best checkpoint.
        best: accuracy under PGD-20, of the best checkpoint.
        last: accuracy under PGD-20, of the last checkpoint.
        autoattack: accuracy under AutoAttack, of the best checkpoint.
        overfit: (best - last) / best.
    """

    natural: float
    best: float | None
    last: float | None
    autoattack: float
    overfit: float | None


TABLE1_SECONDS = {
    "msgd": 0.60,
    "mgnc": 0.61,
    "sngm": 0.63,
    "f-engm": 5.05,
    "n-engm": 0.75,
    "a-engm": 0.83,
    "engm": 5.06,
}
"""Seconds that an iteration takes on a Titan RTX, by optimizer."""

TABLE2 = {
    "msgd": Accuracies(84.70, 50.87, 44.15, 46.77, 13.2),
    "mgnc": Accuracies(83.98, 51.88, 46.62, 47.59, 10.1),
    "sngm": Accuracies(83.73, 51.95, 46.80, 47.75, 9.9),
    "f-engm": Accuracies(82.91, 50.05, 44.04, 46.54, 12.0),
    "n-engm": Accuracies(84.36, 52.19, 48.79, 48.06, 6.5),
    "a-engm": Accuracies(83.61, 52.46, 49.75, 48.46, 5.1),
    # ENGM's best and last give an overfit of 0.5, not the 3.9 that both tables print.
    "engm": Accuracies(83.44, 53.04, 52.76, 49.24, 3.9),
}
"""ResNet-18, CIFAR-10, PGD-10 training."""

_TABLE3 = """
cifar10 vanilla msgd 84.70 50.87 46.77 13.2
cifar10 vanilla engm 83.44 53.04 49.24 3.9
cifar10 trades msgd 82.40 50.94 47.85 5.9
cifar10 trades engm 82.33 53.46 50.07 3.0
cifar10 mart msgd 83.68 51.05 48.29 6.1
cifar10 mart engm 83.03 53.56 50.48 4.6
cifar10 awp msgd 82.98 52.55 50.12 4.6
cifar10 awp engm 83.10 54.07 51.93 2.7
cifar100 vanilla msgd 57.75 26.11 24.45 20.9
cifar100 vanilla engm 56.91 28.43 26.60 7.4
cifar100 trades msgd 56.00 29.04 26.93 10.6
cifar100 trades engm 55.65 30.68 29.20 7.1
cifar100 mart msgd 56.52 29.41 27.18 11.8
cifar100 mart engm 56.20 30.89 29.30 8.6
cifar100 awp msgd 56.22 30.36 28.43 7.3
cifar100 awp engm 56.82 31.24 30.46 6.3
tiny-imagenet vanilla msgd 35.71 7.47 6.92 26.37
tiny-imagenet vanilla engm 29.78 11.29 8.54 10.10
tiny-imagenet trades msgd 37.26 14.13 10.95 14.79
tiny-imagenet trades engm 36.30 16.88 12.65 8.74
tiny-imagenet mart msgd 37.06 13.79 10.08 15.94
tiny-imagenet mart engm 36.53 16.90 12.99 8.20
tiny-imagenet awp msgd 36.13 16.29 13.09 10.67
tiny-imagenet awp engm 36.81 19.14 16.02 7.97
"""


def _table3() -> dict[tuple[str, str, str], Accuracies]:
    found = {}
    for line in _TABLE3.split("\n"):
        if line:
            data, method, optimizer, *figures = line.split()
            natural, pgd, autoattack, overfit = map(float, figures)
            found[data, method, optimizer] = Accuracies(natural, pgd, None, autoattack, overfit)
    return found


TABLE3 = _table3()
"""Rows by data set, training method and optimizer, for l-inf; the l2 results are in a supplement (not at hand)."""

MEAN_GAIN = {"linf": 2.15, "l2": 1.16}
"""ENGM's mean gain over MSGD under AutoAttack in Table 3 and in its supplement, in points (section 3.2)."""

TABLE4 = {
    ("ates", "msgd"): Accuracies(86.84, None, None, 50.72, None),
    ("bs", "msgd"): Accuracies(85.32, None, None, 51.12, None),
    ("lbgat", "msgd"): Accuracies(88.22, None, None, 52.86, None),
    ("trades", "msgd"): Accuracies(84.92, None, None, 53.08, None),
    ("mart", "msgd"): Accuracies(84.98, None, None, 53.17, None),
    ("berm", "msgd"): Accuracies(83.48, None, None, 53.34, None),
    ("fat", "msgd"): Accuracies(84.52, None, None, 53.51, None),
    ("awp", "msgd"): Accuracies(85.36, None, None, 56.17, None),
    ("awp", "n-engm"): Accuracies(85.40, None, None, 57.11, None),
    ("awp", "engm"): Accuracies(86.12, None, None, 57.45, None),
}
"""WRN-34-10, CIFAR-10, by training method and optimizer, in the order of the table."""

TABLE5 = {
    0: (4.25, 118.1, 0.33, 0.30),
    2: (5.10, 118.7, 0.41, 0.42),
    4: (6.09, 121.8, 0.57, 0.61),
    6: (7.73, 141.7, 0.93, 1.08),
    8: (10.04, 185.2, 1.15, 1.35),
    10: (14.21, 253.5, 1.24, 1.49),
}
"""Mean norm, variance, rho of MSGD and rho of ENGM, by eps in 1/255."""
