"""Single files: whole or not at all."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from engm.recipes.storage.atomic_files import make_folder, read_json, replaced_when_whole, write_json, write_text_atomic


def test_json_comes_back_with_nan_and_infinities_as_strings(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": [1, 2.5, None, True, "é"], "n": math.nan, "deep": ({"i": math.inf, "m": -math.inf},)})
    found = read_json(path)
    assert found == {"a": [1, 2.5, None, True, "é"], "n": "nan", "deep": [{"i": "inf", "m": "-inf"}]}
    assert math.isnan(float(found["n"]))
    assert float(found["deep"][0]["m"]) == -math.inf


def test_reading_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        read_json(tmp_path / "absent.json")
    for content in (b'{"a": ', b"", b"\xff\xfe\xfd"):
        (tmp_path / "broken.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken.json: expected JSON"):
            read_json(tmp_path / "broken.json")


def test_what_json_cannot_hold_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert read_json(path) == 1


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    path = tmp_path / "note.txt"
    write_text_atomic(path, "before\n")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match=r"free some space .*note\.txt") as caught:
        write_text_atomic(path, "after\n")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "before\n"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    write_text_atomic(path, "α\r\nβ")
    assert path.read_bytes() == "α\r\nβ".encode()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_text_atomic(tmp_path / "nowhere" / "note.txt", "x")


def test_a_file_that_others_write_replaces_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), replaced_when_whole(path) as temporary:
        interrupted_writing(temporary)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "before"
    with replaced_when_whole(path) as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".pt2")
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def interrupted_writing(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt


def test_a_folder_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    letter = tmp_path / "letter"
    letter.write_text("Dear Sir")
    for folder in (letter, letter / "runs" / "one"):
        with pytest.raises(OSError, match=f"cannot make this folder, because {letter} is a file: '{folder}'"):
            make_folder(folder)
    denied = PermissionError(errno.EACCES, "Permission denied")
    with (
        mock.patch.object(Path, "mkdir", side_effect=denied),
        pytest.raises(OSError, match=r"cannot write: Permission denied; .* see to it that this folder can be written"),
    ):
        make_folder(tmp_path / "runs")
