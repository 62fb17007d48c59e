"""The part of CIFAR-10 that is carried to a GPU: balanced, small, the same for the same seed, and readable."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu.subset import LARGEST, balanced_rows, made_up, read, subset

from engm.recipes.data import load_npz

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu/subset.py"


def images(train=60, test=40, classes=4, side=5):
    generator = np.random.default_rng(1)
    arrays = {}
    for part, count in (("train", train), ("test", test)):
        arrays[f"x_{part}"] = generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = generator.permutation(np.arange(count) % classes).astype(np.uint8)
        arrays[f"x_{part}"][:, 0, 0, 0] = arrays[f"y_{part}"]  # an image tells its label
    return arrays


def command(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_classes_are_balanced_and_images_keep_their_labels():
    found = subset(images(), 26, 8)
    assert sorted(np.bincount(found["y_train"])) == [6, 6, 7, 7]
    assert list(np.bincount(found["y_test"])) == [2, 2, 2, 2]
    for part in ("train", "test"):
        assert np.array_equal(found[f"x_{part}"][:, 0, 0, 0], found[f"y_{part}"])
    assert len(np.unique(found["x_train"].reshape(26, -1), axis=0)) == 26, "an example was drawn twice"
    assert not np.array_equal(found["y_train"], np.sort(found["y_train"])), "a loop would see one class after another"


def test_the_seed_decides():
    first, again, other = (subset(images(), 20, 8, seed) for seed in (0, 0, 1))
    assert np.array_equal(first["x_train"], again["x_train"])
    assert not np.array_equal(first["x_train"], other["x_train"])


def test_too_few_of_a_class():
    labels = np.array([0] * 9 + [1] * 2)
    with pytest.raises(ValueError, match="need 3 of class 1; there are 2"):
        balanced_rows(labels, 6, np.random.default_rng(0))


def test_what_is_too_large_to_carry_is_refused():
    count = LARGEST // (32 * 32 * 3) + 10
    arrays = images(12, 8) | {
        "x_train": np.broadcast_to(np.zeros(1, np.uint8), (count, 32, 32, 3)),
        "y_train": np.arange(count) % 10,
    }
    with pytest.raises(ValueError, match="50 are the limit"):
        subset(arrays, count, 4)


def test_the_command_writes_what_a_run_reads(tmp_path):
    np.savez(tmp_path / "whole.npz", **images())
    done = command(tmp_path / "whole.npz", tmp_path / "new" / "part.npz", "--train", 24, "--test", 8)
    assert done.returncode == 0, done.stderr
    assert "24 training and 8 test examples" in done.stdout
    dataset = load_npz(tmp_path / "new" / "part.npz", validation_examples=4)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (20, 4, 8)


def test_the_command_explains_what_does_not_fit(tmp_path):
    np.savez(tmp_path / "half.npz", x_train=images()["x_train"])
    done = command(tmp_path / "half.npz", tmp_path / "part.npz")
    assert done.returncode == 1
    assert "has no y_train, x_test, y_test" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "part.npz").exists()


def test_made_up_images_have_every_class(tmp_path):
    assert command("made-up", tmp_path / "images.npz", "--train", 20, "--test", 10).returncode == 0
    assert list(np.bincount(read(tmp_path / "images.npz")["y_test"])) == [1] * 10
    assert made_up(20, 10)["x_train"].shape == (30, 32, 32, 3)
