"""Data sets that other packages know by name: torchvision's, timm's and those of Hugging Face's ``datasets``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from engm.checks import check_name

from .dataset import Dataset
from .extras import import_extra
from .torch_sets import Placing, from_torch

OWN = "write a function of your own that returns the data (docs/your_own.md)"
# Words that data sets use for their splits, the usual ones first.
_TRAINING = ("train", "trainval")
_TEST = ("test", "val", "valid", "validation")
_PREFERRED = ("image", "label", "fine_label")  # of several columns: CIFAR-100 has coarse labels, too
# Below torchvision.datasets and in none of these: what reads folders, which have an option of their own.
_NOT_BY_NAME = ("VisionDataset", "ImageFolder", "DatasetFolder")


def load_by_source(spec: str, *, root: str | Path, download: bool, placing: Placing) -> Dataset:
    """Loads ``torchvision:Name``, ``timm:name`` or ``hf:name``.

    Args:
        spec: the source, a colon, and the name that the source knows the data by.
        root: where torchvision and timm look for files.
        download: fetch what is missing.
        placing: how it is split, and where the images go.

    Raises:
        ValueError: an unknown source or name, or data that are no labelled images with a training set.
        FileNotFoundError: it is not here, and ``download`` is false.
        ConnectionError: the download failed.
        ModuleNotFoundError: the source's package is not installed.
    """
    source, _, name = spec.partition(":")
    return _SOURCES[source.strip().lower()](name.strip(), Path(root), download, placing)


def _torchvision(name: str, root: Path, download: bool, placing: Placing) -> Dataset:
    package = import_extra("torchvision.datasets", "data sets of torchvision")
    known = {entry.lower(): entry for entry in package.__all__ if entry not in _NOT_BY_NAME}
    check_name(name.lower(), known, what="data set of torchvision")
    kind = getattr(package, known[name.lower()])
    parameters = inspect.signature(kind).parameters
    common: dict[str, Any] = {key: value for key, value in (("root", str(root)), ("download", download))
                              if key in parameters}  # fmt: skip
    about = f"torchvision:{known[name.lower()]}"
    with_files = _Found(about, root, download)
    if "train" in parameters:
        parts = [with_files.made(kind, {**common, "train": train}) for train in (True, False)]
    elif "split" in parameters:
        parts = [with_files.first(kind, common, words) for words in (_TRAINING, _TEST)]
    else:
        parts = [with_files.made(kind, common)]
    return from_torch(known[name.lower()], *parts, placing=placing)


@dataclass(frozen=True)
class _Found:
    """Makes data sets of torchvision's, and says what to do about those that cannot be made.

    Attributes:
        about: the data set as users type it.
        root: where its files should lie.
        download: whether missing ones are fetched.
    """

    about: str
    root: Path
    download: bool

    def made(self, kind: Callable[..., Any], options: Mapping[str, Any]) -> Any:
        """The data set with these options."""
        try:
            return kind(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.about} cannot be loaded by its name alone ({error}): {OWN}") from error
        except (OSError, HTTPException, RuntimeError) as error:
            if self.download:
                raise ConnectionError(f"{self.about} could not be downloaded to {self.root}: {error}") from error
            raise FileNotFoundError(
                f"{self.about}: not found in {self.root} ({error}); fetch it with --download, or say with --data-root "
                "where it lies"
            ) from error

    def first(self, kind: Callable[..., Any], options: Mapping[str, Any], splits: Sequence[str]) -> Any:
        """The data set with the first of these words for its split that it knows."""
        for split in splits[:-1]:
            try:
                return self.made(kind, {**options, "split": split})
            except ValueError:
                continue
        return self.made(kind, {**options, "split": splits[-1]})


def _timm(name: str, root: Path, download: bool, placing: Placing) -> Dataset:
    factory = _package("timm.data", "timm", f"timm:{name}")
    about = f"timm:{name}"
    parts = []
    for split in ("train", "validation"):
        try:
            parts.append(factory.create_dataset(name, root=str(root), split=split, download=download))
        except (AssertionError, ValueError, RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"{about}: no {split} set in {root} ({error or type(error).__name__}); say with --data-root where it "
                "lies, or fetch it with --download if it is one of torchvision's"
            ) from error
    return from_torch(about, *parts, placing=placing)


def _hugging_face(name: str, root: Path, download: bool, placing: Placing) -> Dataset:
    if not download:  # the library looks at these once, when it is imported; without them it asks the network first
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    library = _package("datasets", "datasets", f"hf:{name}")
    path = Path(name).expanduser()
    try:
        saved = (path / "dataset_dict.json").is_file()
        found = (
            library.load_from_disk(str(path)) if saved else library.load_dataset(str(path) if path.is_dir() else name)
        )
    except (OSError, ValueError, RuntimeError) as error:
        if download:
            raise ConnectionError(f"hf:{name} could not be loaded: {error}") from error
        raise FileNotFoundError(
            f"hf:{name}: neither a folder nor in the cache of Hugging Face, or not to be loaded by its name alone "
            f"({error}); fetch it with --download, or {OWN}"
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(f"hf:{name} has no splits; expected train and one of {', '.join(_TEST)}: {OWN}")
    parts = []
    for words, part in ((_TRAINING, "training"), (_TEST, "test")):
        split = next((word for word in words if word in found), None)
        if split is None:
            raise ValueError(
                f"hf:{name} has no {part} set ({' or '.join(words)}); its splits are {', '.join(found)}: {OWN}"
            )
        parts.append(_columns(found[split], library, f"hf:{name}"))
    return from_torch(f"hf:{path.name if path.is_dir() else name}", *parts, placing=placing)


def _package(module: str, package: str, about: str) -> Any:
    """A module of a package that only these data need."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{about} needs the package {package}: pip install {package}", name=error.name
        ) from error


def _columns(rows: Any, library: ModuleType, about: str) -> _Columns:
    """The columns of a table that hold images and labels, by their types; of several the one of the usual name."""
    kinds = {"images": library.Image, "labels of classes": library.ClassLabel}
    chosen = []
    for what, kind in kinds.items():
        names = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
        preferred = [name for name in names if name in _PREFERRED] if len(names) > 1 else names
        if len(preferred) != 1:
            raise ValueError(
                f"{about} must have one column of {what}, and has {', '.join(names) or 'none'} (all columns: "
                f"{', '.join(rows.features)}): {OWN}"
            )
        chosen.append(preferred[0])
    image, label = chosen
    return _Columns(rows, image, label, list(rows.features[label].names))


@dataclass(frozen=True)
class _Columns:
    """Two columns of a table as a data set of ``(image, label)``.

    Attributes:
        rows: the table.
        image: name of the column of images.
        label: name of the column of labels.
        classes: names of the classes.
    """

    rows: Any
    image: str
    label: str
    classes: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self.rows[index]
        return row[self.image], row[self.label]

    @property
    def targets(self) -> list[int]:
        """The labels of all rows; reads no image."""
        return list(self.rows[self.label])


_SOURCES: dict[str, Callable[[str, Path, bool, Placing], Dataset]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _hugging_face,
}
