"""Loaders: what they return, and what they say about files that are not as described."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engm.recipes.data import load_digits, load_npz


def test_digits_are_split_once_and_for_all() -> None:
    data = load_digits()
    assert [len(part) for part in (data.train, data.validation, data.test)] == [640, 300, 857]
    images = torch.cat([part.inputs for part in (data.train, data.validation, data.test)])
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    torch.manual_seed(99)
    again = load_digits()
    assert torch.equal(data.test.inputs, again.test.inputs)
    assert not torch.equal(data.test.labels, load_digits(split_seed=1).test.labels)


def test_digits_splits_share_no_row() -> None:
    from sklearn.datasets import load_digits as raw

    data = load_digits()
    found = torch.cat([part.inputs for part in (data.train, data.validation, data.test)]).flatten(1)
    whole = torch.as_tensor(raw().data, dtype=torch.float32) / 16
    order = np.lexsort(found.numpy().T), np.lexsort(whole.numpy().T)
    assert torch.equal(found[order[0].copy()], whole[order[1].copy()])


def arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    content = {
        "x_train": rng.integers(0, 256, (20, 4, 5, 3), dtype=np.uint8),
        "y_train": np.arange(20) % 6,
        "x_test": rng.integers(0, 256, (7, 4, 5, 3), dtype=np.uint8),
        "y_test": np.arange(7).astype(np.uint8),
    }
    return {**content, **changes}


def write(folder: Path, **content: np.ndarray) -> Path:
    path = folder / "tiny.npz"
    np.savez(path, **content)
    return path


def test_npz(tmp_path: Path) -> None:
    content = arrays()
    data = load_npz(write(tmp_path, **content), validation_examples=5)
    assert (len(data.train), len(data.validation), len(data.test)) == (15, 5, 7)
    assert data.classes == 7
    assert data.name == "tiny"
    assert data.train.inputs.shape == (15, 3, 4, 5)
    assert data.train.labels.dtype == torch.int64
    expected = torch.as_tensor(content["x_test"]).permute(0, 3, 1, 2).double() / 255
    torch.testing.assert_close(data.test.inputs.double(), expected, rtol=1e-6, atol=0)
    pixels = {tuple(image.flatten().tolist()) for image in torch.cat([data.train.inputs, data.validation.inputs])}
    assert len(pixels) == 20  # held out, not copied
    again = load_npz(tmp_path / "tiny.npz", validation_examples=5)
    assert torch.equal(again.validation.inputs, data.validation.inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((20, 4, 5, 3), dtype=np.float32)}, "x_train must be uint8"),
        ({"x_test": np.zeros((7, 60), dtype=np.uint8)}, "x_test must be uint8"),
        ({"x_test": np.zeros((7, 5, 4, 3), dtype=np.uint8)}, "differ in shape"),
        ({"y_train": np.arange(19)}, "y_train must be integers"),
        ({"y_test": np.linspace(0, 1, 7)}, "y_test must be integers"),
        ({"y_test": np.arange(7) - 1}, "indices from 0"),
        ({"x_test": np.zeros((0, 4, 5, 3), dtype=np.uint8), "y_test": np.zeros(0, dtype=np.int64)}, "at least one"),
        ({"y_train": np.array([None] * 20)}, r"not an \.npz"),
    ],
)
def test_npz_that_is_not_as_described(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    path = write(tmp_path, **arrays(**changes))
    with pytest.raises(ValueError, match=message):
        load_npz(path, validation_examples=5)


def test_npz_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="x_train"):
        load_npz(tmp_path / "nowhere.npz")
    content = arrays()
    del content["y_test"]
    with pytest.raises(ValueError, match="y_test missing"):
        load_npz(write(tmp_path, **content))
    text = tmp_path / "text.npz"
    text.write_text("not an archive")
    with pytest.raises(ValueError, match=r"not an \.npz"):
        load_npz(text)
    single = tmp_path / "single.npy"
    np.save(single, content["x_train"])
    with pytest.raises(ValueError, match=r"not an \.npz"):
        load_npz(single)
    with pytest.raises(ValueError, match="between 1 and 19"):
        load_npz(write(tmp_path, **arrays()), validation_examples=20)
