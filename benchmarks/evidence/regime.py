"""The regime of the experiment: data, network, budget, and the thresholds that are tried; see protocol.md."""

from __future__ import annotations

from typing import Any

TRAINED, VALIDATION, TEST = 1500, 1000, 5000
"""Images that are trained on, chosen by and reported on."""

TUNING_SEED = 100
SEEDS = (0, 1, 2, 3, 4)
FEWER_SEEDS = SEEDS[:3]

SETTINGS: dict[str, Any] = {
    "validation_examples": VALIDATION,
    "augment": "none",
    "model": "preact-resnet18",
    "width": 8,
    "attack_steps": 5,
    "batch_size": 100,
    "epochs": 30,
    "threads": 1,
    "device": "cpu",
    "loggers": ["csv"],
}
"""What all runs share; everything else is as ``engm train`` has it by default."""

LRS = (0.03, 0.1, 0.3)
STEP = 10**0.5
"""By what the grid of learning rates goes on where the best of them lies at its edge."""

ALPHAS = (6.3, 3.6)
NORMS = (0.81, 0.72)
INPUT_ALPHAS = (0.58, 0.16)
DECAYS = (5e-4, 5e-3)

METHODS: dict[str, tuple[str, tuple[float, ...]]] = {
    "msgd": ("weight_decay", DECAYS),
    "engm": ("alpha", ALPHAS),
    "a-engm": ("alpha", ALPHAS),
    "n-engm": ("alpha", INPUT_ALPHAS),
    "f-engm": ("weight_decay", DECAYS),
    "mgnc": ("max_norm", NORMS),
}
"""What is tuned beside the learning rate, with its two values, by method."""
