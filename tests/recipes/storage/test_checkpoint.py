"""Checkpoints: any damage is noticed and named, and there is always a whole one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from training import assert_same

from engm.recipes.failures import CheckpointError
from engm.recipes.storage.checkpoint import CheckpointStore

FILES = ("tensors.safetensors", "state.json", "SHA256SUMS")
TREE = {"number": 7, "pair": (1.5, None), "t": torch.tensor([1.0, float("nan")])}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir() if path.name != ".lock")


def fill(store: CheckpointStore, *numbers: int, prefix: str = "step-") -> None:
    for number in numbers:
        store.save(f"{prefix}{number:08}", {"number": number, "weights": torch.full((300,), float(number))})


def damage(folder: Path, file: str = FILES[0]) -> None:
    content = bytearray((folder / file).read_bytes())
    content[-1] ^= 1
    (folder / file).write_bytes(content)


def without_warnings(store: CheckpointStore, prefix: str = "step-") -> tuple[str, Any] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return store.latest(prefix)


# -- saved and loaded -----------------------------------------------------------------------------------------------


def test_a_tree_comes_back(store: CheckpointStore) -> None:
    assert store.latest() is None
    assert store.save("step-00000007", TREE) == store.folder / "step-00000007"
    assert sorted(path.name for path in (store.folder / "step-00000007").iterdir()) == sorted(FILES)
    found = store.load("step-00000007")
    assert_same(found, TREE)
    assert type(found["pair"]) is tuple
    found["t"].zero_()  # writable memory of its own
    assert_same(store.load("step-00000007"), TREE)


def test_sha256sum_agrees(store: CheckpointStore) -> None:
    folder = store.save("step-1", TREE)
    check = [shutil.which("sha256sum") or pytest.skip("no sha256sum here"), "--strict", "-c", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 0
    damage(folder)
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 1


def test_nothing_is_pickled(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, refuse)
    store.save("step-1", TREE)
    assert_same(store.load("step-1"), TREE)
    assert without_warnings(store) is not None


def test_bad_arguments_write_nothing(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", ".hidden", "../up", "a/b", "step 1", "step-1\n"):
        with pytest.raises(ValueError, match="a checkpoint's name"):
            store.save(name, TREE)
        with pytest.raises(ValueError, match="a checkpoint's name"):
            store.load(name)
    with pytest.raises(TypeError, match=r"^optimizer/closure: "):
        store.save("step-1", {"optimizer": {"closure": print}})
    for keep in (0, -1):
        with pytest.raises(ValueError, match="keep must be at least 1"):
            CheckpointStore(store.folder, keep)
        with pytest.raises(ValueError, match="keep must be at least 1"):
            store.prune(keep=keep)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"engm\[recipes\]"):
        store.save("step-1", TREE)
    assert not store.folder.exists()


# -- damaged --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_a_change_of_any_byte_is_noticed(store: CheckpointStore, file: str) -> None:
    path = store.save("step-1", {"t": torch.tensor([1.0])}) / file
    whole = path.read_bytes()
    for index in range(len(whole)):
        for mask in (1, 0x80, 0x20):  # 0x20 turns a into A: the same number in hexadecimal
            path.write_bytes(whole[:index] + bytes([whole[index] ^ mask]) + whole[index + 1 :])
            with pytest.raises(CheckpointError, match=rf"step-1/.*{file}.*altered"):
                store.load("step-1")
    path.write_bytes(whole)
    store.load("step-1")


@pytest.mark.parametrize("file", FILES)
def test_truncation_at_any_length_is_noticed(store: CheckpointStore, file: str) -> None:
    path = store.save("step-1", {"t": torch.tensor([1.0])}) / file
    whole = path.read_bytes()
    for content in (*(whole[:length] for length in range(len(whole))), whole + b"\n", whole + whole):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"step-1/{file}: .*truncated"):
            store.load("step-1")


def test_files_that_are_missing_or_added_are_named(store: CheckpointStore) -> None:
    folder = store.save("step-1", TREE)
    for file in FILES:
        os.rename(folder / file, store.folder / "kept")
        with pytest.raises(CheckpointError, match=rf"step-1/{file}: missing"):
            store.load("step-1")
        (folder / file).mkdir()
        with pytest.raises(CheckpointError, match=rf"step-1/{file}: cannot be read"):
            store.load("step-1")
        (folder / file).rmdir()
        os.rename(store.folder / "kept", folder / file)
    (folder / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"step-1/notes\.txt: not ours"):
        store.load("step-1")
    with pytest.raises(CheckpointError, match=r"step-2: missing"):
        store.load("step-2")
    (store.folder / "step-3").touch()
    with pytest.raises(CheckpointError, match=r"step-3: cannot be read"):
        store.load("step-3")


FOREIGN = {
    "newer format version 2, this engm reads up to 1": {"format": "engm checkpoint", "version": 2, "tree": None},
    "not ours: it does not say": {"format": "other", "version": 1, "tree": None},
    "not ours: it does not say 'engm checkpoint'": [1],
    "not ours: .*version": {"format": "engm checkpoint", "version": "1", "tree": None},
    "not ours: the tensor 'absent' is missing": {
        "format": "engm checkpoint",
        "version": 1,
        "tree": {"tensor": "absent"},
    },
    "not ours: 'tree'": {"format": "engm checkpoint", "version": 1},
    "not ours: ": "not JSON",
}


@pytest.mark.parametrize("reason", FOREIGN)
def test_right_checksums_over_something_else_are_refused(store: CheckpointStore, reason: str) -> None:
    folder = store.save("step-1", TREE)
    content = FOREIGN[reason]
    (folder / "state.json").write_text("{" if content == "not JSON" else json.dumps(content))
    seal(folder)
    with pytest.raises(CheckpointError, match=rf"step-1/state\.json: {reason}"):
        store.load("step-1")


def test_tensors_of_another_make_are_refused(store: CheckpointStore) -> None:
    folder = store.save("step-1", TREE)
    (folder / FILES[0]).write_bytes(b"\x80\x04K\x01.")  # a pickle
    seal(folder)
    with pytest.raises(CheckpointError, match=r"step-1/tensors\.safetensors: not ours"):
        store.load("step-1")


def seal(folder: Path) -> None:
    digests = [f"{hashlib.sha256((folder / file).read_bytes()).hexdigest()}  {file}\n" for file in FILES[:2]]
    (folder / "SHA256SUMS").write_text("".join(digests))


# -- the newest that verifies ---------------------------------------------------------------------------------------


def test_latest_goes_by_number_and_series(store: CheckpointStore) -> None:
    fill(store, 9, 10)
    store.save("step-1000", {"number": 1000})
    fill(store, 2000, prefix="best-")
    store.save("step-final", {})
    found = without_warnings(store)
    assert found is not None
    assert (found[0], found[1]["number"]) == ("step-1000", 1000)
    best = store.latest("best-")
    assert best is not None
    assert best[0] == "best-00002000"
    assert store.latest("other-") is None


def test_latest_warns_of_what_it_skips(store: CheckpointStore) -> None:
    fill(store, 100, 200, 300)
    damage(store.folder / "step-00000300", "state.json")
    (store.folder / "step-00000200" / "SHA256SUMS").unlink()
    with pytest.warns(UserWarning, match="used instead") as caught:
        found = store.latest()
    assert found is not None
    assert found[0] == "step-00000100"
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert "step-00000300/state.json: checksum differs" in messages[0]
    assert "step-00000200/SHA256SUMS: missing" in messages[1]
    assert all("The previous one, step-00000100, is used instead" in message for message in messages)
    assert {Path(warning.filename).name for warning in caught} == {"test_checkpoint.py"}


def test_latest_refuses_when_all_are_damaged(store: CheckpointStore) -> None:
    fill(store, 1, 2)
    for number in (1, 2):
        damage(store.folder / f"step-{number:08}")
    with pytest.raises(CheckpointError, match=r"(?s)none of the 2 .*step-00000002/tensors.*step-00000001/tensors"):
        store.latest()


# -- pruned ---------------------------------------------------------------------------------------------------------


def test_prune_keeps_the_newest(store: CheckpointStore) -> None:
    fill(store, 1, 2, 3, 4, 10)
    fill(store, 1, prefix="best-")
    store.prune("step-")
    assert names(store) == ["best-00000001", "step-00000004", "step-00000010"]
    store.prune("step-", keep=1)
    assert names(store) == ["best-00000001", "step-00000010"]


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(store: CheckpointStore) -> None:
    fill(store, 1, 2, 3, 4)
    damage(store.folder / "step-00000004")
    CheckpointStore(store.folder).prune(keep=1)
    assert names(store) == ["step-00000003", "step-00000004"]
    fill(store, 5)
    store.prune(keep=1)
    assert names(store) == ["step-00000005"]


def test_drop_after_deletes_what_comes_later(store: CheckpointStore) -> None:
    fill(store, 9, 10, 11)
    fill(store, 11, prefix="best-")
    damage(store.folder / "step-00000011")
    store.drop_after("step-", 9)
    assert names(store) == ["best-00000011", "step-00000009"]


def test_prune_sweeps_up_after_the_dead_only(store: CheckpointStore) -> None:
    fill(store, 1)
    with subprocess.Popen(["true"]) as process:
        process.wait()
    dead, living = process.pid, os.getppid()
    for name in (f".tmp-step-9-{dead}", f".tmp-step-8-{living}", f".tmp-step-7-{living}", ".tmp-unrelated"):
        (store.folder / name).mkdir()
        (store.folder / name / FILES[0]).touch()
    old = time.time() - 1e6
    os.utime(store.folder / f".tmp-step-7-{living}", (old, old))
    os.utime(store.folder / ".tmp-unrelated", (old, old))
    store.prune()
    assert names(store) == sorted([f".tmp-step-8-{living}", ".tmp-unrelated", "step-00000001"])


def test_a_replacement_that_was_cut_short_is_undone(store: CheckpointStore) -> None:
    fill(store, 1, 2)
    with subprocess.Popen(["true"]) as process:
        process.wait()
    os.rename(store.folder / "step-00000002", store.folder / f".old-step-00000002-{process.pid}")
    reader = CheckpointStore(store.folder)
    before = names(store)
    assert reader.load("step-00000002")["number"] == 2
    found = without_warnings(reader)
    assert found is not None
    assert found[0] == "step-00000002"
    assert names(store) == before, "reading changes nothing"
    reader.prune()
    assert names(store) == ["step-00000001", "step-00000002"]
    os.rename(store.folder / "step-00000002", store.folder / f".old-step-00000002-{process.pid}")
    store.save("step-00000002", {"number": 22})
    assert names(store) == ["step-00000001", "step-00000002"]
    assert store.load("step-00000002") == {"number": 22}


# -- failing to write -----------------------------------------------------------------------------------------------


class FullAfter:
    """A function of ``os`` that fails at one of its calls."""

    def __init__(self, function: str, call: int) -> None:
        self.genuine = getattr(os, function)
        self.left = call

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.genuine(*args, **options)


CALLS = [("fsync", call) for call in range(1, 6)] + [("mkdir", 1), ("rename", 1)]
FULL = [(name, *call) for name in ("step-00000001", "step-00000002") for call in CALLS]


@pytest.mark.parametrize(("name", "function", "call"), [*FULL, ("step-00000001", "rename", 2)])
def test_a_full_disk_leaves_what_there_was(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, name: str, function: str, call: int
) -> None:
    fill(store, 1)
    with monkeypatch.context() as patched:
        patched.setattr(os, function, FullAfter(function, call))
        with pytest.raises(OSError, match=rf"free some space.*checkpoints/{name}") as caught:
            store.save(name, TREE)
    assert caught.value.errno == errno.ENOSPC
    in_place = (function, call) == ("fsync", 5)  # of the folder, when all is in place and only the power may still fail
    assert not any(entry.startswith(".tmp") for entry in names(store))
    assert store.load("step-00000001")["number"] == (7 if in_place and name == "step-00000001" else 1)
    assert (name in names(store)) == (in_place or name == "step-00000001")
    store.save(name, TREE)
    assert_same(store.load(name), TREE)
    store.prune(keep=9)
    assert names(store) == sorted({"step-00000001", name})


def test_a_write_that_stops_in_the_middle_names_the_file(store: CheckpointStore) -> None:
    fill(store, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match=r"File too large.*free some space.*step-00000002/tensors\.safetensors"):
            fill(store, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(store) == ["step-00000001"]
    assert without_warnings(store) is not None


def test_an_interrupted_replacement_puts_the_old_one_back(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, 1)
    genuine = os.rename

    def interrupted(source: Path, target: Path) -> None:
        if ".tmp" in str(source):
            raise KeyboardInterrupt
        genuine(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save("step-00000001", {"number": 2})
    assert names(store) == ["step-00000001"]
    assert store.load("step-00000001")["number"] == 1
