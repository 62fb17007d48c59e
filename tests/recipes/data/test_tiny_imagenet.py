"""Tiny-ImageNet: a small folder in the published layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engm.recipes.data import Dataset, Split, StreamedSplit, load_data, load_tiny_imagenet
from engm.recipes.data.identity import identity

WNIDS = ("n03", "n01", "n02")  # not in order, as in the published file
TEST = ("n02", "n03", "n03", "n01")
SPLITS = ("train", "validation", "test")


def write_jpeg(path: Path, seed: int, *, grey: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64) if grey else (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "tiny-imagenet-200"
    root.mkdir()
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    for k, wnid in enumerate(WNIDS):
        for number in range(3):
            write_jpeg(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", 10 * k + number, grey=number == 1)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    lines = []
    for number, wnid in enumerate(TEST):
        write_jpeg(root / "val" / "images" / f"val_{number}.JPEG", 100 + number, grey=number == 2)
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    write_jpeg(root / "test" / "images" / "test_0.JPEG", 1000)  # without labels: never read
    return root


def pixels_of(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def load(root: Path, **options: object) -> Dataset:
    return load_tiny_imagenet(root, validation_examples=2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("in_memory", [True, False])
def test_reads_the_layout(folder: Path, in_memory: bool) -> None:
    data = load(folder.parent, in_memory=in_memory, workers=0)
    assert data.classes == 3
    assert isinstance(data.train, Split if in_memory else StreamedSplit)
    assert (len(data.train), len(data.validation), len(data.test)) == (7, 2, 4)
    assert data.train.shape == (3, 64, 64)
    assert (data.augment.padding, data.augment.flip) == (4, True)
    x, y = data.test.batch(torch.arange(4))
    assert y.tolist() == [1, 2, 2, 0]  # by sorted identifiers
    for number in range(4):
        assert torch.equal(x[number], pixels_of(folder / "val" / "images" / f"val_{number}.JPEG"))
    found = set()
    for split in (data.train, data.validation):
        found |= {(x.numpy().tobytes(), int(y)) for x, y in zip(*split.batch(torch.arange(len(split))), strict=True)}
    expected = {
        (pixels_of(path).contiguous().numpy().tobytes(), sorted(WNIDS).index(path.parts[-3]))
        for path in folder.glob("train/*/images/*.JPEG")
    }
    assert found == expected


def test_the_folder_itself_or_the_one_around_it(folder: Path) -> None:
    assert torch.equal(load(folder).train.labels, load(folder.parent).train.labels)
    for found in (
        load_data("Tiny_ImageNet", root=folder.parent, validation_examples=2),
        load_data(folder, validation_examples=2),
    ):
        assert found.name == "tiny-imagenet"
        assert torch.equal(found.train.labels, load(folder).train.labels)


def rearrange(folder: Path, *, inner: str, annotations: bool) -> None:
    """What scripts for ImageFolder do with the validation images."""
    for number, wnid in enumerate(TEST):
        target = folder / "val" / wnid / inner / f"val_{number}.JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "val" / "images" / target.name).rename(target)
    (folder / "val" / "images").rmdir()
    if not annotations:
        (folder / "val" / "val_annotations.txt").unlink()


@pytest.mark.parametrize(("inner", "annotations"), [("images", True), ("", False)])
def test_rearranged_validation_images_are_the_same_test_set(folder: Path, inner: str, annotations: bool) -> None:
    before = load(folder)
    rearrange(folder, inner=inner, annotations=annotations)
    after = load(folder)
    assert {s: identity(getattr(before, s)) for s in SPLITS} == {s: identity(getattr(after, s)) for s in SPLITS}
    assert torch.equal(after.test.batch(torch.arange(4))[0], before.test.batch(torch.arange(4))[0])
    shutil.rmtree(folder / "val" / TEST[0])
    with pytest.raises(FileNotFoundError, match=rf"val.{TEST[0]}.*no images|no images .*val.{TEST[0]}"):
        load(folder)


def test_training_images_right_in_the_folders_of_their_classes(folder: Path) -> None:
    before = load(folder)
    for wnid in WNIDS:
        for path in (folder / "train" / wnid / "images").iterdir():
            path.rename(folder / "train" / wnid / path.name)
        (folder / "train" / wnid / "images").rmdir()
    assert identity(load(folder).train) == identity(before.train)


def test_what_is_missing_is_said_with_its_address(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"fetch http://cs231n\.stanford\.edu/tiny-imagenet-200\.zip .* unpack it"
    ):
        load(tmp_path)
    (tmp_path / "tiny-imagenet-200.zip").touch()
    with pytest.raises(FileNotFoundError, match=r"archive is there and has to be unpacked: python -m zipfile -e"):
        load(tmp_path)


def test_held_out_of_the_test_set(folder: Path) -> None:
    data = load(folder, validation_from_test=True)
    assert (len(data.train), len(data.validation), len(data.test)) == (9, 2, 2)
    assert sorted([*data.validation.labels.tolist(), *data.test.labels.tolist()]) == [0, 1, 2, 2]


def test_folders_that_are_not_as_described(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no Tiny-ImageNet at .*cannot be downloaded.*unpack"):
        load(tmp_path / "nowhere")
    annotations = folder / "val" / "val_annotations.txt"
    text = annotations.read_text()
    annotations.write_text(text.replace("n01", "n09"))
    with pytest.raises(ValueError, match=r"val_annotations\.txt.*n09"):
        load(folder)
    annotations.write_text(text + "val_9.JPEG\tn01\t0\t0\t1\t1\n")
    with pytest.raises(FileNotFoundError, match=r"val_9\.JPEG"):
        load(folder)
    annotations.unlink()
    with pytest.raises(FileNotFoundError, match=r"val_annotations\.txt; Tiny-ImageNet has"):
        load(folder)
    annotations.write_text("")
    with pytest.raises(FileNotFoundError, match="names 0 images"):
        load(folder)
    shutil.rmtree(folder / "train" / "n02")
    with pytest.raises(FileNotFoundError, match=r"no images .*n02.images.*class n02"):
        load(folder)


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_unreadable_image_is_named(folder: Path, in_memory: bool) -> None:
    path = folder / "train" / "n02" / "images" / "n02_2.JPEG"
    path.write_bytes(path.read_bytes()[:300])

    def read_everything() -> None:
        data = load(folder, in_memory=in_memory, workers=0)
        for split in (data.train, data.validation):
            split.batch(torch.arange(len(split)))

    with pytest.raises(ValueError, match=r"n02_2\.JPEG: cannot be used as an image"):
        read_everything()
