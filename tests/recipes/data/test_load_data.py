"""Data by name or path: what is found, what is refused, and where images are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engm.recipes.data import DATASETS, Dataset, Split, StreamedSplit, load_data, load_digits, memory, registry


def write_npz(path: Path, n: int = 12) -> Path:
    rng = np.random.default_rng(0)
    part = {
        f"{kind}_{name}": value
        for name, count in (("train", n), ("test", 5))
        for kind, value in (
            ("x", rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)),
            ("y", np.arange(count) % 3),
        )
    }
    np.savez(path, **part)
    return path


@pytest.mark.parametrize("spec", ["digits", "Digits", "DIGITS"])
def test_digits(spec: str) -> None:
    data = load_data(spec)
    assert isinstance(data.train, Split)
    assert isinstance(data.test, Split)
    assert torch.equal(data.test.labels, load_digits().test.labels)
    assert data.train.inputs.dtype == torch.float32
    assert (data.augment.padding, data.augment.flip) == (0, False)


@pytest.mark.parametrize(
    "options",
    [{"validation_examples": 300}, {"split_seed": 1}, {"validation_from_test": True}],
)
def test_digits_have_a_split_of_their_own(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="fixed split of 640 training, 300 validation and 857 test"):
        load_data("digits", **options)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("cifar10", "cifar10"),
        ("CIFAR-10", "cifar10"),
        ("Cifar_100", "cifar100"),
        ("svhn", "svhn"),
        ("TinyImageNet", "tiny-imagenet"),
        ("tiny_imagenet", "tiny-imagenet"),
    ],
)
def test_names_and_their_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, name: str) -> None:
    asked: dict[str, Any] = {}

    def loader(root: Path, **options: Any) -> Dataset:
        asked.update(root=root, **options)
        return load_digits()

    monkeypatch.setitem(registry._TORCHVISION, name, loader)
    monkeypatch.setattr(registry, "load_tiny_imagenet", loader)
    held_out = {"validation_examples": 7, "split_seed": 3, "validation_from_test": True}
    load_data(spec, root=tmp_path, download=True, workers=5, **held_out)  # type: ignore[arg-type]
    own = {"in_memory": "auto", "device": "cpu", "workers": 5} if name == "tiny-imagenet" else {"download": True}
    assert asked == {"root": tmp_path, **held_out, **own}


def test_every_name_is_looked_for_under_root(tmp_path: Path) -> None:
    for name in DATASETS[1:]:
        with pytest.raises(FileNotFoundError, match=r"missing or damaged|no Tiny-ImageNet"):
            load_data(name, root=tmp_path)


def test_npz(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "some.NPZ".lower())
    data = load_data(str(path), validation_examples=4)
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 4, 5)
    data = load_data(path, validation_examples=4, validation_from_test=True)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 4, 1)


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "pictures"
    for part in ("train", "test"):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (5, 4), (number, 2, 3)).save(root / part / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    data = load_data("pictures", image_size=3, validation_examples=1)
    assert data.name == "pictures"
    assert data.train.shape == (3, 3, 3)
    monkeypatch.setenv("HOME", str(tmp_path))
    data = load_data("~/pictures", validation_examples=1, in_memory=False, workers=0)
    assert data.train.shape == (3, 4, 5)
    assert isinstance(data.train, StreamedSplit)


def test_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="did you mean cifar10"):
        load_data("cifra10")
    with pytest.raises(ValueError, match=r"unknown data set, and neither a file.*: 'mnist'.*digits, cifar10"):
        load_data("mnist")
    for path in ("./cifar10", "some/folder", str(tmp_path / "x"), "~/x", "pictures.zip", "nowhere.npz"):
        with pytest.raises(FileNotFoundError, match=r"no data (file )?at .*expected an \.npz"):
            load_data(path)
    (tmp_path / "text.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"text\.csv: expected an \.npz file or a folder"):
        load_data("text.csv")


def test_image_size_is_for_folders(tmp_path: Path) -> None:
    for spec in ("digits", "cifar10", "tiny-imagenet", write_npz(tmp_path / "some.npz")):
        with pytest.raises(ValueError, match=r"--image-size.* is for folders"):
            load_data(spec, image_size=32, root=tmp_path)


# -- where images are kept -----------------------------------------------------------------------------------------


def kinds(data: Dataset) -> set[type]:
    return {type(split) for split in (data.train, data.validation, data.test)}


def test_arrays_that_the_device_cannot_hold_stay_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, size = write_npz(tmp_path / "some.npz"), 17 * 48
    free = {"cpu": 0, "cuda": 2 * size}  # they are on the host already, however little is free there
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[device.type])

    def load(**options: Any) -> Dataset:
        return load_data(path, validation_examples=4, workers=0, **options)

    assert kinds(load()) == {Split}
    assert kinds(load(device="cuda")) == {Split}
    free["cuda"] -= 1
    assert kinds(load(device="cuda")) == {StreamedSplit}
    assert kinds(load(device=torch.device("cuda:0"))) == {StreamedSplit}
    assert kinds(load(device="cuda", in_memory=True)) == {Split}
    assert kinds(load(in_memory=False)) == {StreamedSplit}


def test_streamed_arrays_give_the_same_batches(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "some.npz")
    here, there = (load_data(path, validation_examples=4, in_memory=choice, workers=0) for choice in (True, False))
    rows = [torch.tensor([3, 0, 7]), torch.tensor([2])]
    for (x, y), (other_x, other_y) in zip(here.train.batches(rows), there.train.batches(rows), strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
    digits, streamed = load_data("digits"), load_data("digits", in_memory=False, workers=0)
    assert torch.equal(digits.test.batch(rows[0])[0], streamed.test.batch(rows[0])[0])


def test_a_choice_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in_memory must be 'auto', True or False"):
        load_data(write_npz(tmp_path / "some.npz"), validation_examples=4, in_memory="maybe")  # type: ignore[arg-type]
