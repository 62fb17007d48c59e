"""Data sets of others: of torch's kind, by name from torchvision, timm and Hugging Face, and from a function."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.datasets import FakeData

from engm.recipes.data import Augmentation, Placing, Split, StreamedSplit, from_torch, identities, load_data

HELD = Placing(validation_examples=4)


def fake(count: int, offset: int = 0, size: tuple[int, int, int] = (3, 8, 6), classes: int = 3) -> FakeData:
    return FakeData(count, size, classes, random_offset=offset)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_the_images_and_labels_are_those_of_the_items() -> None:
    train, test = fake(20), fake(9, 100)
    dataset = from_torch("fake", train, test, validation=fake(5, 200), placing=Placing())
    assert (dataset.name, dataset.classes, dataset.train.shape) == ("fake", 3, (3, 8, 6))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (20, 5, 9)
    assert isinstance(dataset.train, Split)
    for row in range(20):
        assert torch.equal(dataset.train.inputs[row], pixels(train[row][0]))
        assert int(dataset.train.labels[row]) == int(train[row][1])


def test_streamed_and_in_memory_are_the_same() -> None:
    sets = [
        from_torch("fake", fake(20), fake(9, 100), placing=Placing(validation_examples=4, in_memory=where, workers=0))
        for where in (True, False)
    ]
    assert isinstance(sets[1].train, StreamedSplit)
    assert identities(sets[0]) == identities(sets[1])
    assert len(sets[0].train) == 16


def test_arrays_tensors_and_grey_images() -> None:
    class Arrays:
        targets = [0, 1] * 5

        def __len__(self) -> int:
            return 10

        def __getitem__(self, row: int) -> tuple[Any, int]:
            return np.full((4, 5, 3), row, np.uint8), self.targets[row]

    dataset = from_torch("arrays", Arrays(), placing=Placing(validation_examples=2))
    assert dataset.train.shape == (3, 4, 5)
    assert (len(dataset.train), len(dataset.test)) == (6, 2)  # every fifth image for the test
    values = [int(split.batch(torch.arange(len(split)))[0][k].mul(255).mean().round()) for split in
              (dataset.train, dataset.validation, dataset.test) for k in range(len(split))]  # fmt: skip
    assert sorted(values) == list(range(10))
    floats = TensorDataset(torch.rand(12, 1, 4, 4), torch.arange(12) % 2)
    grey = from_torch("floats", floats, placing=HELD)
    assert grey.augment == Augmentation()
    assert grey.classes == 2
    scaled = from_torch("fake", fake(12), fake(6, 90), placing=Placing(image_size=4, validation_examples=2))
    assert scaled.train.shape == (3, 4, 4)


class Items(list):  # type: ignore[type-arg]
    """A list of items is a data set."""


BLACK = torch.zeros(1, 2, 2)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (Items([(BLACK * float("nan"), 0)] * 8), r"has values that are not finite, expected numbers in \[0, 1\]"),
        (Items([(BLACK - 1, 0)] * 8), r"has values in \[-1, -1\], expected \[0, 1\]: leave the normalisation out"),
        (Items([(BLACK, 0.5)] * 8), "label 0 of the training set of mine must be the integer index"),
        (Items([(BLACK, {"a": 1})] * 8), "label 0 of the training set of mine must be the integer index of a class"),
        (Items([(BLACK,)] * 8), r"item 0 of the training set of mine must be \(image, label\)"),
        (Items([(BLACK.double(), 0)] * 8), r"must be a Pillow image.*got Tensor of torch.float64 \[1, 2, 2\]"),
        (Items([]), "the training set of mine is empty"),
        (Items([(BLACK, 0)] * 8 + [(torch.zeros(1, 2, 3), 0)]), "differ in shape.*give an image_size"),
        (iter([]), "must have a length and items by index"),
        (Items([(BLACK, 0)] * 3), "only 3 images, too few to hold some out"),
        (Items([(BLACK, -1)] * 8), "labels must be class indices from 0"),
    ],
)
def test_what_is_refused(items: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_torch("mine", items, placing=Placing(validation_examples=1))


def test_random_transforms_and_a_test_of_the_training_images_are_refused() -> None:
    noisy = FakeData(9, (3, 4, 4), 2, transform=lambda image: torch.rand(3, 4, 4))
    with pytest.raises(ValueError, match=r"another image each time.*leave random transforms out"):
        from_torch("noisy", noisy, placing=HELD)
    with pytest.raises(ValueError, match="the test images are the training images"):
        from_torch("same", fake(9), fake(9), placing=HELD)
    with pytest.raises(ValueError, match="has a validation set of its own: leave --validation-examples"):
        from_torch("three", fake(9), fake(9, 50), validation=fake(9, 70), placing=HELD)


# -- torchvision -----------------------------------------------------------------------------------------------------


class Halves(FakeData):
    """What MNIST looks like from outside."""

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        if not Path(root).is_dir() and not download:
            raise RuntimeError("Dataset not found")
        super().__init__(12 if train else 6, (3, 4, 4), 2, random_offset=0 if train else 100)


class Splits(FakeData):
    """What Oxford's pets look like from outside."""

    def __init__(self, root: str, split: str = "trainval") -> None:
        if split not in ("trainval", "test"):
            raise ValueError(f"Unknown value '{split}' for argument split.")
        super().__init__(12, (3, 4, 4), 2, random_offset=0 if split == "trainval" else 100)


class Whole(FakeData):
    """What EuroSAT looks like from outside."""

    def __init__(self, root: str) -> None:
        super().__init__(20, (3, 4, 4), 2)


class Demanding(FakeData):
    def __init__(self, root: str, year: int) -> None:
        super().__init__(20, (3, 4, 4), 2)


@pytest.fixture
def torchvision_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (Halves, Splits, Whole, Demanding)
    monkeypatch.setattr(torchvision.datasets, "__all__", (*torchvision.datasets.__all__, *(k.__name__ for k in kinds)))
    for kind in kinds:
        monkeypatch.setattr(torchvision.datasets, kind.__name__, kind, raising=False)


@pytest.mark.usefixtures("torchvision_sets")
def test_torchvision_by_name(tmp_path: Path) -> None:
    for name, sizes in {"Halves": (10, 2, 6), "splits": (10, 2, 12), "Whole": (14, 2, 4)}.items():
        dataset = load_data(f"torchvision:{name}", root=tmp_path, validation_examples=2)
        assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == sizes
        assert dataset.name == name.capitalize()
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match=r"torchvision:Halves: not found in .*missing.*--download"):
        load_data("torchvision:Halves", root=missing, validation_examples=2)
    assert len(load_data("torchvision:Halves", root=missing, download=True, validation_examples=2).train) == 10
    with pytest.raises(ValueError, match=r"torchvision:Demanding cannot be loaded by its name alone.*your own"):
        load_data("torchvision:Demanding", root=tmp_path)
    with pytest.raises(ValueError, match="unknown data set of torchvision: 'halfes'; did you mean halves"):
        load_data("torchvision:Halfes", root=tmp_path)


# -- timm ------------------------------------------------------------------------------------------------------------


def test_timm_reads_its_folders(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (4, 4, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    dataset = load_data("timm:folder", root=tmp_path, validation_examples=2)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test), dataset.classes) == (10, 2, 6, 2)
    with pytest.raises(FileNotFoundError, match="timm:torch/nothing: no train set in"):
        load_data("timm:torch/nothing", root=tmp_path)


# -- Hugging Face ----------------------------------------------------------------------------------------------------


class ImageFeature:
    pass


class ClassLabel:
    def __init__(self, *names: str) -> None:
        self.names = list(names)


class Table:
    """What a table of the package datasets looks like from outside."""

    def __init__(self, count: int, offset: int, **features: Any) -> None:
        self.features = {"img": ImageFeature(), "text": object(), **features}
        self._fake = fake(count, offset, classes=2)

    def __len__(self) -> int:
        return len(self._fake)

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return [int(self._fake[row][1]) for row in range(len(self))]
        image, label = self._fake[key]
        return {"img": image, "text": "", **dict.fromkeys(list(self.features)[2:], int(label))}


def tables(**features: Any) -> dict[str, Table]:
    return {"train": Table(12, 0, **features), "validation": Table(6, 100, **features)}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the package datasets."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    known: dict[str, Any] = {"our/pets": tables(label=ClassLabel("cat", "dog"))}

    def load_dataset(name: str) -> Any:
        if name not in known:
            raise FileNotFoundError(f"Couldn't find {name}")
        return known[name]

    library = SimpleNamespace(
        Image=ImageFeature, ClassLabel=ClassLabel, load_dataset=load_dataset, load_from_disk=load_dataset, known=known
    )
    monkeypatch.setitem(sys.modules, "datasets", library)  # type: ignore[arg-type]
    return library


def test_hugging_face_by_name_and_folder(library: SimpleNamespace, tmp_path: Path) -> None:
    dataset = load_data("hf:our/pets", validation_examples=2)
    assert (dataset.name, dataset.classes) == ("hf:our/pets", 2)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (10, 2, 6)
    assert torch.equal(dataset.test.batch(torch.tensor([1]))[1], torch.tensor([int(fake(6, 100, classes=2)[1][1])]))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").touch()
    library.known[str(tmp_path / "saved")] = tables(label=ClassLabel("cat", "dog"))
    assert load_data(f"hf:{tmp_path}/saved", validation_examples=2).name == "hf:saved"


def test_fine_labels_before_coarse_ones(library: SimpleNamespace) -> None:
    library.known["cifar100"] = tables(fine_label=ClassLabel("cat", "dog"), coarse_label=ClassLabel("pet"))
    assert load_data("hf:cifar100", validation_examples=2).classes == 2


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            tables(fine=ClassLabel("a"), coarse=ClassLabel("b")),
            "must have one column of labels of classes, and has fine",
        ),
        (tables(), "must have one column of labels of classes, and has none"),
        ({"train": Table(9, 0, label=ClassLabel("a", "b"))}, "has no test set .*; its splits are train"),
        (Table(9, 0, label=ClassLabel("a", "b")), "has no splits"),
    ],
)
def test_tables_that_are_no_images_with_classes(library: SimpleNamespace, found: Any, message: str) -> None:
    library.known["odd"] = found
    with pytest.raises(ValueError, match=message):
        load_data("hf:odd")


@pytest.mark.usefixtures("library")
def test_what_is_not_here_says_so() -> None:
    with pytest.raises(FileNotFoundError, match=r"hf:nobody/nothing: neither a folder nor in the cache.*--download"):
        load_data("hf:nobody/nothing")
    with pytest.raises(ConnectionError, match="hf:nobody/nothing could not be loaded"):
        load_data("hf:nobody/nothing", download=True)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="hf:x needs the package datasets: pip install datasets"):
        load_data("hf:x")


# -- a function of one's own -----------------------------------------------------------------------------------------

OWN = """
import torch
from torchvision.datasets import FakeData
from engm.recipes.data import Dataset, Split

def pair(root, image_size=None):
    return FakeData(12, (3, 4, 4), 2), FakeData(6, (3, 4, 4), 2, random_offset=100)

def triple():
    return (*pair(""), FakeData(6, (3, 4, 4), 2, random_offset=200))

def split(n, classes=2, size=4):
    return Split(torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(n)), torch.arange(n) % classes)

def ours():
    return Dataset("ours", 2, split(12), split(5), split(6))

def one_class_more():
    return Dataset("ours", 2, split(12), split(5), split(6, 3))

def another_size():
    return Dataset("ours", 2, split(12), split(5), split(6, size=5))

def one():
    return FakeData(12, (3, 4, 4), 2)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own_data.py").write_text(OWN)
    return tmp_path / "own_data.py"


def test_a_function_of_ones_own(own: Path) -> None:
    sizes = {
        name: tuple(len(getattr(load_data(f"{own}:{name}", **more), part)) for part in ("train", "validation", "test"))
        for name, more in {"pair": {"validation_examples": 2}, "triple": {}, "ours": {}}.items()
    }
    assert sizes == {"pair": (10, 2, 6), "triple": (12, 6, 6), "ours": (12, 5, 6)}
    assert load_data(f"{own}:pair", validation_examples=2).name == "own_data.pair"


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("one", {}, r"must return an engm.recipes.data.Dataset, or \(train, test\).* returned a FakeData"),
        ("ours", {"validation_examples": 3}, "has a validation set of its own"),
        ("ours", {"image_size": 8}, "has no parameter of this name"),
        ("one_class_more", {}, "test split: labels must be class indices from 0 to 1"),
        ("another_size", {}, r"images of the train split are \[1, 4, 4\], those of the test split \[1, 5, 5\]"),
        ("oers", {}, "did you mean ours"),
    ],
)
def test_what_functions_may_not_return(own: Path, name: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(f"{own}:{name}", **more)
