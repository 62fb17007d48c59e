"""Splits, digits and `.npz` files: what they hold, and what is said of files that are not as described."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engm.recipes.data import Augmentation, Dataset, Split, load_digits, load_npz
from engm.recipes.data.dataset import check_labels, hold_out


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
        "y_test": (np.arange(7) % 6).astype(np.uint8),
    }
    return {**content, **changes}


def write(folder: Path, **content: np.ndarray) -> Path:
    path = folder / "tiny.npz"
    np.savez(path, **content)
    return path


def with_nan() -> np.ndarray:
    images = np.full((20, 4, 5, 3), 0.5)
    images[7, 1, 2, 0], images[9, 0, 0, 1] = np.inf, np.nan
    return images


def test_npz(tmp_path: Path) -> None:
    content = arrays()
    data = load_npz(write(tmp_path, **content), validation_examples=5)
    assert (len(data.train), len(data.validation), len(data.test)) == (15, 5, 7)
    assert data.classes == 6
    assert data.name == "tiny"
    assert data.train.inputs.shape == (15, 3, 4, 5)
    assert data.train.labels.dtype == torch.int64
    assert data.train.inputs.dtype == torch.uint8
    assert torch.equal(data.test.inputs, torch.as_tensor(content["x_test"]).permute(0, 3, 1, 2))
    assert (data.augment.padding, data.augment.flip) == (4, True)
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
        ({"y_train": np.eye(20)}, r"y_train must be integers \[20\].*Save y_train.argmax\(1\) in its place"),
        ({"y_test": np.arange(7) - 1}, "indices from 0, and at least one: the lowest is -1"),
        ({"x_test": np.zeros((0, 4, 5, 3), dtype=np.uint8), "y_test": np.zeros(0, dtype=np.int64)}, "at least one"),
        ({"y_train": np.array([None] * 20)}, r"not an \.npz"),
        ({"y_test": np.arange(7)}, "y_train has the classes 0 to 5, and y_test has 6 as well"),
        (
            {"x_train": np.zeros((20, 3, 16, 16), dtype=np.uint8)},
            r"images of 3x16 pixels with 16 channels; if the channels come first, save x_train",
        ),
        (
            {"x_train": np.zeros((20, 16, 32, 32), dtype=np.uint8)},
            r"x_train\.transpose\(0, 2, 3, 1\)",
        ),
        ({"x_test": np.zeros((7, 1, 8, 8), dtype=np.uint8)}, r"save x_test\.transpose"),
        ({"x_train": np.full((20, 4, 5, 3), 0.5)}, r"Save \(x_train \* 255\)\.round\(\)\.astype\(np\.uint8\) in its"),
        ({"x_train": np.full((20, 4, 5, 3), 200.0)}, r"Save \(x_train\)\.round\(\)\.astype\(np\.uint8\) in its"),
        ({"x_train": np.full((20, 4, 5, 3), -1.5)}, r"between -1\.5 and -1\.5: save them as they were before norm"),
        ({"x_train": np.full((20, 4, 5, 3), 300)}, "lie between 300 and 300: expected grey levels from 0 to 255"),
        ({"x_train": with_nan()}, "2 of its numbers are not finite, the first in image 7, counted from 0"),
        ({"x_train": 1.02 * np.ones((20, 4, 5, 3))}, "lie between 1.02 and 1.02: save whole numbers from 0 to 255"),
        ({"x_train": np.zeros((20, 4, 5), np.uint8)}, r"Save x_train\[\.\.\., None\] in its place"),
        ({"x_train": np.zeros((20, 4, 5), np.int64)}, r"Save x_train\[\.\.\., None\]\.astype\(np\.uint8\) in its"),
    ],
)
def test_npz_that_is_not_as_described(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    path = write(tmp_path, **arrays(**changes))
    with pytest.raises(ValueError, match=message):
        load_npz(path, validation_examples=5)


def test_what_is_no_npz_at_all(tmp_path: Path) -> None:
    (tmp_path / "junk.npz").write_bytes(b"a letter")
    with pytest.raises(ValueError, match=r"junk\.npz: not an \.npz, whatever its name says$"):
        load_npz(tmp_path / "junk.npz")


def test_npz_with_labels_from_1(tmp_path: Path) -> None:
    content = arrays()
    counted = {name: content[name] + 1 for name in ("y_train", "y_test")}
    with pytest.warns(UserWarning, match="no training image has the class 0 of 0 to 6: do labels count from 1"):
        assert load_npz(write(tmp_path, **{**content, **counted}), validation_examples=5).classes == 7
    gap = {"y_train": np.where(content["y_train"] == 3, 4, content["y_train"]), "y_test": np.zeros(7, np.int64)}
    with pytest.warns(UserWarning, match=r"no training image has the class 3 of 0 to 5$"):
        load_npz(write(tmp_path, **{**content, **gap}), validation_examples=5)


def test_npz_with_validation_images_from_the_test_set(tmp_path: Path) -> None:
    content = arrays()
    path = write(tmp_path, **content)
    data = load_npz(path, validation_examples=2, validation_from_test=True)
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 2, 5)
    pixels = [tuple(image.flatten().tolist()) for split in (data.validation, data.test) for image in split.inputs]
    test = torch.as_tensor(content["x_test"]).permute(0, 3, 1, 2)
    assert sorted(pixels) == sorted(tuple(image.flatten().tolist()) for image in test)
    with pytest.raises(ValueError, match="between 1 and 6"):
        load_npz(path, validation_examples=7, validation_from_test=True)


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_files_that_are_damaged(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "tiny.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays())
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:300] + bytes(200) + whole[500:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tiny\.npz: not an \.npz of plain arrays"):
            load_npz(path, validation_examples=5)


def test_npz_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="x_train"):
        load_npz(tmp_path / "nowhere.npz")
    content = arrays()
    del content["y_test"]
    content["labels"] = np.arange(7)
    with pytest.raises(ValueError, match="y_test missing, and it holds labels"):
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


def test_bytes_become_the_floats_that_division_gives() -> None:
    everything = torch.arange(256, dtype=torch.uint8).view(64, 1, 2, 2)
    split = Split(everything, torch.arange(64))
    x, y = split.batch(torch.arange(64).flip(0))
    assert x.dtype == torch.float32
    expected = (torch.arange(256, dtype=torch.float64) / 255).float().view(64, 1, 2, 2)
    assert torch.equal(x, expected.flip(0))
    assert torch.equal(y, torch.arange(64).flip(0))
    assert torch.equal(split.inputs, everything)
    assert split.shape == (1, 2, 2)
    assert split.take(torch.tensor([3, 3])).inputs.dtype == torch.uint8
    first, second = split.batches([torch.tensor([1]), torch.tensor([2, 0])])
    assert torch.equal(first[0], expected[1:2])
    assert second[1].tolist() == [2, 0]


def test_float_images_are_left_alone() -> None:
    images = torch.rand(5, 3, 2, 4)
    x, _ = Split(images, torch.zeros(5, dtype=torch.int64)).batch(torch.tensor([4, 1]))
    assert torch.equal(x, images[[4, 1]])


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), "inputs must be"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), "inputs must be"),
        (torch.zeros(3, 1, 2, 2), torch.zeros(2, dtype=torch.int64), "labels must be"),
        (torch.zeros(3, 1, 2, 2), torch.zeros(3), "labels must be"),
    ],
)
def test_splits_of_other_types_or_shapes(inputs: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Split(inputs, labels)


def numbered(n: int, start: int = 0) -> Split:
    return Split(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(start, start + n))


@given(st.integers(2, 30), st.integers(2, 30), st.data(), st.booleans(), st.integers(0, 5))
def test_held_out_once_and_for_all(n: int, tested: int, data: st.DataObject, from_test: bool, seed: int) -> None:
    count = data.draw(st.integers(1, (tested if from_test else n) - 1))
    options = {"validation_examples": count, "split_seed": seed, "validation_from_test": from_test}
    parts = hold_out(numbered(n), numbered(tested, 1000), **options)  # type: ignore[arg-type]
    train, validation, test = (part.labels.tolist() for part in parts)
    assert len(validation) == count
    held_in, old = (test, range(1000, 1000 + tested)) if from_test else (train, range(n))
    assert sorted(held_in + validation) == list(old)
    assert sorted(train if from_test else test) == list(range(n) if from_test else range(1000, 1000 + tested))
    assert test == sorted(test)
    torch.manual_seed(data.draw(st.integers(0, 9)))
    again = hold_out(numbered(n), numbered(tested, 1000), **options)  # type: ignore[arg-type]
    assert all(torch.equal(part.labels, other.labels) for part, other in zip(parts, again, strict=True))


def test_labels_that_are_no_classes() -> None:
    check_labels(torch.tensor([0, 4, 2]), 5, Path("some.bin"))
    for label in (-1, 5):
        with pytest.raises(ValueError, match=f"some.bin.*from 0 to 4; 1 of 3 are not, the first {label} at row 1"):
            check_labels(torch.tensor([0, label, 2]), 5, Path("some.bin"))


def test_a_dataset_moves_as_a_whole() -> None:
    data = Dataset("some", 2, numbered(3), numbered(2), numbered(1))
    assert data.augment == Augmentation()
    data = Dataset("some", 2, numbered(3), numbered(2), numbered(1), Augmentation(2, flip=True)).to("meta")
    assert {split.labels.device.type for split in (data.train, data.validation, data.test)} == {"meta"}
    assert data.augment == Augmentation(2, flip=True)
