"""Folders of images: numbering, sizes, memory or not, and what is said of folders that are not as described."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.datasets import ImageFolder

from engm.recipes.data import Dataset, Split, StreamedSplit, load_image_folder, memory

CLASSES = ("ant", "bee", "cat")


def write_image(path: Path, seed: int, *, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> None:
    """Noise; ``size`` is ``(width, height)``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def write_folder(root: Path, *, test: str = "test", per_class: int = 4) -> Path:
    seed = 0
    for part, count in (("train", per_class), (test, 2)):
        for name in CLASSES:
            for number in range(count):
                seed += 1
                write_image(root / part / name / f"{number}.png", seed)
    return root


def as_pairs(*splits: Split | StreamedSplit) -> list[tuple[bytes, int]]:
    found = []
    for split in splits:
        x, y = split.batch(torch.arange(len(split)))
        found += [(image.numpy().tobytes(), int(label)) for image, label in zip(x, y, strict=True)]
    return found


def of_torchvision(folder: Path) -> list[tuple[bytes, int]]:
    return [((TF.pil_to_tensor(image).float() / 255).numpy().tobytes(), label) for image, label in ImageFolder(folder)]


def load(root: Path, image_size: int | None = None, **options: object) -> Dataset:
    return load_image_folder(root, image_size, validation_examples=3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("test", ["test", "val"])
def test_equals_torchvision(tmp_path: Path, in_memory: bool, test: str) -> None:
    root = write_folder(tmp_path / "insects", test=test)
    data = load(root, in_memory=in_memory, workers=0)
    assert data.name == "insects"
    assert data.classes == 3
    assert isinstance(data.train, Split if in_memory else StreamedSplit)
    assert data.train.shape == (3, 5, 6)
    assert (len(data.train), len(data.validation), len(data.test)) == (9, 3, 6)
    assert sorted(as_pairs(data.train, data.validation)) == sorted(of_torchvision(root / "train"))
    assert sorted(as_pairs(data.test)) == sorted(of_torchvision(root / test))
    assert (data.augment.padding, data.augment.flip) == (4, True)
    if isinstance(data.train, Split):
        assert data.train.inputs.dtype == torch.uint8


def test_streamed_is_as_in_memory(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    here, there = load(root, 7, in_memory=True), load(root, 7, in_memory=False, workers=1)
    for name in ("train", "validation", "test"):
        memory, streamed = getattr(here, name), getattr(there, name)
        rows = list(torch.randperm(len(memory)).split(2))
        for (x, y), (other_x, other_y) in zip(memory.batches(rows), streamed.batches(rows), strict=True):
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)


def test_test_is_preferred_to_val(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    write_image(root / "val" / "ant" / "0.png", 99)
    assert len(load(root).test) == 6


def test_held_out_of_the_test_set(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    data = load(root, validation_from_test=True)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 3, 3)
    assert sorted(as_pairs(data.train)) == sorted(of_torchvision(root / "train"))
    assert sorted(as_pairs(data.validation, data.test)) == sorted(of_torchvision(root / "test"))


@pytest.mark.parametrize("size", [(12, 5), (5, 12), (20, 20), (4, 3), (5, 5)])
def test_scales_the_shorter_side_and_crops_the_centre(tmp_path: Path, size: tuple[int, int]) -> None:
    root = write_folder(tmp_path)
    write_image(root / "train" / "ant" / "9.png", 7, size=size)
    data = load(root, 5)
    assert data.train.shape == (3, 5, 5)
    with Image.open(root / "train" / "ant" / "9.png") as image:
        scale = 5 / min(size)
        resized = image.resize((int(size[0] * scale), int(size[1] * scale)), Image.Resampling.BILINEAR)
        left, top = round((resized.width - 5) / 2), round((resized.height - 5) / 2)
        expected = np.asarray(resized.crop((left, top, left + 5, top + 5)), dtype=np.float32) / 255
    wanted = torch.from_numpy(expected).permute(2, 0, 1).contiguous().numpy().tobytes()
    assert (wanted, 0) in as_pairs(data.train, data.validation)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    root = write_folder(tmp_path)
    path = root / "train" / "bee" / f"9.{'tif' if mode == 'CMYK' else 'png'}"
    write_image(path, 5, mode=mode)
    with Image.open(path) as image:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    data = load(root)
    assert ((expected.float() / 255).contiguous().numpy().tobytes(), 1) in as_pairs(data.train, data.validation)  # type: ignore[arg-type]


@pytest.mark.parametrize("in_memory", [True, False])
def test_more_than_eight_bits_are_refused(tmp_path: Path, in_memory: bool) -> None:
    root = write_folder(tmp_path)
    deep = np.random.default_rng(0).integers(0, 65536, (5, 6), dtype=np.uint16)
    Image.fromarray(deep).save(root / "train" / "ant" / "0.png")
    with pytest.raises(ValueError, match=r"ant.0\.png.*8 bits a channel"):
        read_everything(load(root, in_memory=in_memory, workers=0))


def read_everything(data: Dataset) -> None:
    for split in (data.train, data.validation, data.test):
        list(split.batches([torch.arange(len(split))]))


@pytest.mark.parametrize("content", [b"no image", b"", "cut"])
@pytest.mark.parametrize(("in_memory", "workers"), [(True, 0), (False, 0), (False, 1)])
def test_an_unreadable_image_is_named(tmp_path: Path, content: bytes | str, in_memory: bool, workers: int) -> None:
    root = write_folder(tmp_path)
    path = root / "test" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:60] if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"^\S*test.bee.1\.png: cannot be used as an image[^\n]*$"):
        read_everything(load(root, 5, in_memory=in_memory, workers=workers))


def test_sizes_that_differ(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    write_image(root / "test" / "cat" / "0.png", 3, size=(6, 7))
    with pytest.raises(ValueError, match=r"differ in size: .*5x6 .*test.cat.0\.png is 7x6 .*--image-size"):
        load(root)
    assert load(root, 4).test.shape == (3, 4, 4)
    with pytest.raises(ValueError, match="image_size must be at least 1"):
        load(root, 0)


def test_folders_that_are_not_as_described(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.train"):
        load(tmp_path / "nowhere")
    root = tmp_path / "some"
    (root / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"test or .*val; expected"):
        load(root)
    (root / "test").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no classes in .*train"):
        load(root)
    write_folder(root)
    write_image(root / "test" / "dog" / "0.png", 1)
    with pytest.raises(ValueError, match=r"same classes, got dog only in .*test$"):
        load(root)
    (root / "train" / "dog").mkdir()
    (root / "train" / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=r"train: a class without images: .*dog"):
        load(root)
    write_image(root / "train" / "eel" / "0.jpg", 1)
    with pytest.raises(ValueError, match="got eel only in"):
        load(root)
    with pytest.raises(ValueError, match="between 1 and 11"):
        load_image_folder(write_folder(tmp_path / "few"), validation_examples=12)


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "train" / ".cache").mkdir()
    assert load(root).classes == 3


# -- what fits ---------------------------------------------------------------------------------------------------


def test_auto_takes_half_of_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path)
    size = 18 * 3 * 5 * 6
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * size)
    assert isinstance(load(root).train, Split)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * size - 1)
    data = load(root)
    assert isinstance(data.train, StreamedSplit)
    assert isinstance(data.validation, StreamedSplit)
    assert isinstance(data.test, StreamedSplit)


def test_free_memory_of_the_host_and_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.free_bytes(torch.device("cpu")) <= whole
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    assert memory.free_bytes(torch.device("cuda")) == 1000
    assert memory.keep_in_memory("auto", 500, "cpu", "cuda")
    assert not memory.keep_in_memory("auto", 501, "cpu", "cuda")
    assert memory.keep_in_memory(True, 10**18, "cpu")
    assert not memory.keep_in_memory(False, 1, "cpu")
    with pytest.raises(ValueError, match="'auto', True or False, got 'yes'"):
        memory.keep_in_memory("yes", 1)  # type: ignore[arg-type]


def test_without_torchvision_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets.folder", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'engm\[recipes\]'"):
        load(write_folder(tmp_path))
