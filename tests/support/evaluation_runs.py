"""A little network that tells halves of images apart, its data in a file, and a run folder that it lives in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from typer.testing import CliRunner, Result

from engm.recipes.accuracy import evaluate, pgd20
from engm.recipes.cli import app
from engm.recipes.data import Dataset, load_data
from engm.recipes.models import build_model
from engm.recipes.runs.folder import RunFolder

EPS = 0.1
TRAINING = "--model small-resnet --width 3 --eps 0.1 --epochs 5 --batch-size 8 --attack-steps 1 --evaluation-steps 2"
TRAINING = f"{TRAINING} --threads 1 --step eager --loggers none --validation-examples 16 --lr 0.05 --optimizer msgd"
TRAINING = f"{TRAINING} --augment none --evaluate-every 5 --data"


def engm(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "400"})


def ran(*words: object) -> str:
    """What a command that must succeed prints."""
    result = engm(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refused(*words: object) -> str:
    """What a command that must fail says."""
    result = engm(*words)
    assert result.exit_code == 1, (result.output, result.exception)
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def write_images(path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 80), ("test", 40)):
        labels = np.arange(count) % 3
        images = draw.integers(0, 120, (count, 8, 8, 3))
        for row, label in enumerate(labels):
            images[row, :, :, label] += draw.integers(10, 90)
        arrays |= {f"x_{part}": images.astype(np.uint8), f"y_{part}": labels}
    np.savez(path, **arrays)


@dataclass(frozen=True)
class Trained:
    """A run, and what is known of its last weights by looking at them directly."""

    path: Path
    data: Path
    weights: dict[str, torch.Tensor]
    natural: float
    robust: float

    @property
    def options(self) -> tuple[object, ...]:
        """What ``engm evaluate FILE`` has to be told."""
        return ("--model", "small-resnet", "--width", 3, "--data", self.data, "--eps", EPS)

    def dataset(self) -> Dataset:
        return load_data(self.data, validation_examples=16)

    def network(self) -> torch.nn.Module:
        net = build_model("small-resnet", classes=3, in_channels=3, image_size=8, width=3)
        net.load_state_dict(self.weights)
        return net.eval()


def train_in(folder: Path) -> Trained:
    """Trains the little run in a folder."""
    write_images(folder / "data.npz")
    ran("train", *TRAINING.split(), folder / "data.npz", "--out", folder / "run")
    weights = RunFolder(folder / "run").weights("last").weights
    made = Trained(folder / "run", folder / "data.npz", weights, 0.0, 0.0)
    looked = evaluate(made.network(), made.dataset().test, pgd20(EPS, steps=3))
    assert looked.robust is not None
    assert 0.2 < looked.robust < looked.natural
    return Trained(made.path, made.data, weights, looked.natural, looked.robust)
