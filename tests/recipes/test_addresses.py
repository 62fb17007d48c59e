"""Code of one's own by its address: how it is found, how it is called, and what is said where it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from engm.recipes.addresses import (
    addresses_noted,
    call,
    failure_of_own_code,
    is_address,
    load,
    settled,
    short_name,
    takes,
)


@pytest.mark.parametrize("text", ["nets:Net", "my.nets:make_net", "nets.py:Net", "../other/nets.py:Net", " a:b "])
def test_an_address(text: str) -> None:
    assert is_address(text)


@pytest.mark.parametrize(
    "text",
    [
        "torchvision:resnet18",
        "timm:resnet18",
        "hf:cifar10",
        "TIMM:x",
        "resnet18",
        "data/x.npz",
        "a:b-c",
        "my nets:Net",
        ":x",
    ],
)
def test_no_address(text: str) -> None:
    assert not is_address(text)
    assert settled(text) == text


def test_a_module_below_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "addressed_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text("def build():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    assert load("addressed_package.nets:build", what="network")() == 3
    with pytest.raises(ValueError, match=r"unknown network in addressed_package.nets: 'bild'; did you mean build\?"):
        load("addressed_package.nets:bild", what="network")
    with pytest.raises(ValueError, match=r"'nest'; did you mean nets.* was looked for in addressed_package"):
        load("addressed_package.nest:build", what="network")
    with pytest.raises(ValueError, match="did you mean addressed_package"):
        load("adressed_package.nets:build", what="network")
    with pytest.raises(ValueError, match="'torchvison'; did you mean torchvision"):
        load("torchvison:resnet18", what="network", also=("torchvision",))


def test_a_file_that_imports_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    (tmp_path / "addressed_neighbour.py").write_text("VALUE = 5\n")
    (tmp_path / "mine.py").write_text("from addressed_neighbour import VALUE\n")
    assert load(f"{tmp_path}/mine.py:VALUE", what="network") == 5
    with pytest.raises(FileNotFoundError, match=r"no file .*main.py with the network; in that folder: .*mine.py"):
        load(f"{tmp_path}/main.py:VALUE", what="network")
    monkeypatch.chdir(tmp_path)
    assert settled("mine.py:VALUE") == f"{tmp_path}/mine.py:VALUE"
    assert short_name(f"{tmp_path}/mine.py:VALUE") == "mine.VALUE"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_package_of_theirs\n", "ModuleNotFoundError: No module named 'no_such_package_of_theirs'.*:1"),
        ("x = 1\ny = x / 0\n", "ZeroDivisionError: division by zero, at .*broken.py:2"),
        ("def f(:\n", "SyntaxError.*broken.py:1"),
    ],
)
def test_a_module_that_fails(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "broken.py").write_text(text)
    for _ in range(2):  # it is not taken for imported the second time
        with pytest.raises(ValueError, match=f"cannot be imported: {message}"):
            load(f"{tmp_path}/broken.py:f", what="network")


def test_calls() -> None:
    def function(num_classes: int, width: int = 3) -> tuple[int, int]:
        return num_classes, width

    must, may = {"num_classes": 10}, {"width": 5, "in_channels": 1}
    assert call(function, "m:f", must, may) == (10, 5)
    assert call(function, "m:f", must, {}) == (10, 3)
    assert call(lambda **given: given, "m:f", must, may) == must
    assert takes(function, "width")
    assert not takes(function, "in_channels")
    with pytest.raises(ValueError, match=r"m:f is called with num_classes=.*it has no parameter num_classes"):
        call(lambda width: width, "m:f", must, may)
    with pytest.raises(ValueError, match=r"with width=, in_channels= where it has these.*nobody gives it depth"):
        call(lambda num_classes, depth: depth, "m:f", must, may)
    with pytest.raises(ValueError, match=r"m:f failed: ZeroDivisionError: division by zero, at .*test_addresses.py:"):
        call(lambda num_classes: num_classes / 0, "m:f", must, may)
    with pytest.raises(ValueError, match="m:f is a int; expected a function or a class"):
        call(3, "m:f", must, may)  # type: ignore[arg-type]


def test_a_failure_is_told_of_the_address_that_was_called(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("def break_it():\n    return {}['nothing']\n")
    source = "import beside_it\n\n\ndef one():\n    return 1\n\n\ndef two():\n    return beside_it.break_it()\n"
    (tmp_path / "two_of_them.py").write_text(source)
    addresses = [f"{tmp_path}/two_of_them.py:{name}" for name in ("one", "two")]

    def failure() -> str | None:
        found = [load(address, what="thing") for address in addresses]
        try:
            found[1]()
        except KeyError as error:
            # The frame of this test is left out, since this file is a user's as well.
            return failure_of_own_code(error.with_traceback(error.__traceback__.tb_next))  # type: ignore[union-attr]
        raise AssertionError("it does not fail")

    assert failure() is None  # outside of a command
    with addresses_noted():
        said = failure() or ""
    assert [line for line in said.splitlines() if not set(line) <= set(" ^~")] == [
        f"{addresses[1]} failed: KeyError: 'nothing', at {tmp_path}/beside_it.py:2",
        f'  File "{tmp_path}/two_of_them.py", line 9, in two',
        "    return beside_it.break_it()",
        f'  File "{tmp_path}/beside_it.py", line 2, in break_it',
        "    return {}['nothing']",
    ]
    assert failure() is None
