"""CIFAR and SVHN: small files in the published formats, read by the code that reads the real ones."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
import urllib.error
from collections.abc import Callable
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from torchvision import datasets

from engm.recipes.data import Dataset, Split, load_cifar10, load_cifar100, load_svhn

Pixels = dict[str, np.ndarray]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, classes: int = 10) -> Pixels:
    """Files of 8 images each; sums of these in place of the published ones."""
    rng = np.random.default_rng(0)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    content: Pixels = {}
    key = "labels" if classes == 10 else "fine_labels"

    def written(name: str, value: dict[str, Any]) -> str:
        (folder / name).write_bytes(pickle.dumps(value))
        return md5(folder / name)

    for part, names in (("train", kind.train_list), ("test", kind.test_list)):
        new, images, labels = [], [], []
        for name, _ in names:
            data = rng.integers(0, 256, (8, 3072), dtype=np.uint8)
            own = rng.integers(0, classes, 8).tolist()
            new.append([name, written(name, {"data": data, key: own})])
            images.append(data.reshape(8, 3, 32, 32))
            labels += own
        content[f"x_{part}"], content[f"y_{part}"] = np.concatenate(images), np.array(labels)
        monkeypatch.setattr(kind, f"{part}_list", new)
    meta = {**kind.meta, "md5": written(kind.meta["filename"], {kind.meta["key"]: [str(k) for k in range(classes)]})}
    monkeypatch.setattr(kind, "meta", meta)
    return content


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> Pixels:
    rng = np.random.default_rng(1)
    root.mkdir(exist_ok=True)
    content, listed = {}, dict(datasets.SVHN.split_list)
    for part, count in (("train", 11), ("test", 7)):
        url, name, _ = listed[part]
        images = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        labels = np.arange(count) % 10
        stored = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)  # the file calls the digit 0 ten
        scipy.io.savemat(root / name, {"X": images.transpose(2, 3, 1, 0), "y": stored})
        listed[part] = [url, name, md5(root / name)]
        content[f"x_{part}"], content[f"y_{part}"] = images, labels
    monkeypatch.setattr(datasets.SVHN, "split_list", listed)
    return content


def together(*splits: Any) -> set[tuple[bytes, int]]:
    """What is in some splits, whatever the order."""
    found = [
        (image.numpy().tobytes(), int(y))
        for split in splits
        for image, y in zip(split.inputs, split.labels, strict=True)
    ]
    assert len(set(found)) == len(found)
    return set(found)


def raw(content: Pixels, part: str) -> set[tuple[bytes, int]]:
    return {(x.tobytes(), int(y)) for x, y in zip(content[f"x_{part}"], content[f"y_{part}"], strict=True)}


def check(content: Pixels, load: Callable[..., Dataset], classes: int) -> None:
    data = load(validation_examples=3)
    assert data.classes == classes
    for split in (data.train, data.validation, data.test):
        assert isinstance(split, Split)
        assert split.inputs.dtype == torch.uint8
        assert split.inputs.is_contiguous()
        assert split.shape == (3, 32, 32)
    assert len(data.validation) == 3
    assert together(data.train, data.validation) == raw(content, "train")
    assert together(data.test) == raw(content, "test")
    assert (data.augment.padding, data.augment.flip) == (4, True)
    again, other = load(validation_examples=3), load(validation_examples=3, split_seed=1)
    assert torch.equal(data.validation.batch(torch.arange(3))[0], again.validation.batch(torch.arange(3))[0])
    assert together(data.validation) != together(other.validation)
    paper = load(validation_examples=3, validation_from_test=True)
    assert together(paper.train) == raw(content, "train")
    assert together(paper.validation, paper.test) == raw(content, "test")
    assert len(paper.validation) == 3


@pytest.mark.parametrize(("kind", "load", "classes"), [("CIFAR10", load_cifar10, 10), ("CIFAR100", load_cifar100, 100)])
def test_cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, load: Callable[..., Dataset], classes: int
) -> None:
    content = write_cifar(tmp_path, getattr(datasets, kind), monkeypatch, classes)
    check(content, lambda **options: load(tmp_path, **options), classes)


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_svhn(tmp_path, monkeypatch)
    check(content, lambda **options: load_svhn(tmp_path, **options), 10)


@pytest.mark.parametrize("load", [load_cifar10, load_cifar100, load_svhn])
def test_nothing_there(tmp_path: Path, load: Callable[..., Dataset]) -> None:
    with pytest.raises(FileNotFoundError, match=r"--download.*which are at https?://[a-z]"):
        load(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_4"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match=r"damaged.*: cifar-10-batches-py/data_batch_4; .*--download"):
        load_cifar10(tmp_path)


def test_a_label_that_is_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, datasets.CIFAR10, monkeypatch, classes=10)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps({**pickle.loads(path.read_bytes()), "labels": [1, 2, 3, 10, 0, 0, -1, 0]}))
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5(path)]])
    with pytest.raises(ValueError, match=r"cifar-10-batches-py.*0 to 9; 2 of 8 are not, the first 10 at row 3"):
        load_cifar10(tmp_path, validation_examples=1)


def test_too_few_to_hold_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"between 1 and 10 \(there are 11 training"):
        load_svhn(tmp_path, validation_examples=11)
    with pytest.raises(ValueError, match=r"between 1 and 6 \(there are 7 test"):
        load_svhn(tmp_path, validation_examples=7, validation_from_test=True)


# -- downloads ---------------------------------------------------------------------------------------------------


class Server:
    """Stands in for the network below torchvision: copies files, or fails half way through one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
        self.files = files
        self.fails_at: str | None = None
        self.failure: Exception | None = None
        self.asked: list[str] = []
        monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
        monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", self)

    def __call__(self, url: str, filename: str) -> None:
        name = url.rpartition("/")[2]
        self.asked.append(name)
        content = (self.files / name).read_bytes()
        if name != self.fails_at:
            Path(filename).write_bytes(content)
            return
        Path(filename).write_bytes(content[: len(content) // 2])
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def cifar_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Server, Pixels]:
    files = tmp_path / "server"
    content = write_cifar(files, datasets.CIFAR10, monkeypatch)
    archive = files / datasets.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(files / datasets.CIFAR10.base_folder, datasets.CIFAR10.base_folder)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive))
    return Server(monkeypatch, files), content


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_download(tmp_path: Path, cifar_server: tuple[Server, Pixels]) -> None:
    server, content = cifar_server
    root = tmp_path / "made" / "for it"
    data = load_cifar10(root, download=True, validation_examples=3)
    assert together(data.train, data.validation) == raw(content, "train")
    (server.files / datasets.CIFAR10.filename).unlink()
    assert everything_in(root) == everything_in(server.files)  # without the archive
    assert load_cifar10(root, download=True, validation_examples=3).classes == 10
    assert load_cifar10(root, validation_examples=3).classes == 10
    assert server.asked == ["cifar-10-python.tar.gz"]


def test_download_mends_what_is_damaged(tmp_path: Path, cifar_server: tuple[Server, Pixels]) -> None:
    _, content = cifar_server
    folder = tmp_path / "root" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "test_batch").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    data = load_cifar10(tmp_path / "root", download=True, validation_examples=3)
    assert together(data.test) == raw(content, "test")
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no route to host"),
        ConnectionResetError(104, "reset by peer"),
        TimeoutError("timed out"),
        IncompleteRead(b"half"),
        None,  # ends early, so that its sum is wrong
    ],
)
def test_interrupted_download_leaves_nothing(
    tmp_path: Path, cifar_server: tuple[Server, Pixels], failure: Exception | None
) -> None:
    server, _ = cifar_server
    server.fails_at, server.failure = "cifar-10-python.tar.gz", failure
    root = tmp_path / "root"
    root.mkdir()
    (root / "other").write_text("stays")
    with pytest.raises(ConnectionError, match="CIFAR10 could not be downloaded"):
        load_cifar10(root, download=True)
    assert everything_in(root) == ["other"]


def test_svhn_appears_when_both_files_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path / "server", monkeypatch)
    server = Server(monkeypatch, tmp_path / "server")
    server.fails_at, server.failure = "test_32x32.mat", urllib.error.URLError("no route to host")
    root = tmp_path / "root"
    with pytest.raises(ConnectionError, match=r"SVHN.*no route to host.*train_32x32\.mat"):
        load_svhn(root, download=True)
    assert everything_in(root) == []
    server.fails_at = None
    assert len(load_svhn(root, download=True, validation_examples=2).train) == 9
    assert everything_in(root) == ["test_32x32.mat", "train_32x32.mat"]


def test_full_disk_is_not_the_network(tmp_path: Path, cifar_server: tuple[Server, Pixels]) -> None:
    server, _ = cifar_server
    server.fails_at, server.failure = "cifar-10-python.tar.gz", OSError(28, "No space left on device")
    with pytest.raises(OSError, match=r"No space left.*free some space") as caught:
        load_cifar10(tmp_path / "root", download=True)
    assert not isinstance(caught.value, ConnectionError)
    assert everything_in(tmp_path / "root") == []


def test_interrupted_by_hand(tmp_path: Path, cifar_server: tuple[Server, Pixels]) -> None:
    server, _ = cifar_server
    server.fails_at, server.failure = "cifar-10-python.tar.gz", KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        load_cifar10(tmp_path / "root", download=True)
    assert everything_in(tmp_path / "root") == []
