"""What ``make wheel`` put into ``$ENGM_DIST``: complete, and working where nothing else of this repository is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import engm

ROOT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# A little of every kind: the compiled module, the engine, an optimizer, the recipes.
TRIED = ["test_build.py", "capture/test_capture.py", "optim/test_engm.py", "recipes/test_config.py"]

built = pytest.mark.skipif("ENGM_DIST" not in os.environ, reason="make wheel builds a distribution and then tries it")


def folder() -> Path:
    return ROOT / os.environ["ENGM_DIST"]


def wheel() -> Path:
    (found,) = folder().glob("*.whl")
    return found


def sources(top: str, *suffixes: str) -> set[str]:
    """Files of the repository under a folder that a distribution has to hold."""
    paths = (ROOT / top).rglob("*")
    return {str(path.relative_to(ROOT)) for path in paths if path.suffix in suffixes}


PACKAGE = sources("engm", ".py", ".pyi") | {"engm/py.typed"}


def test_the_version_is_in_one_place() -> None:
    assert engm.__version__ == engm.build_info()["engm"] == VERSION
    (newest, *_) = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert newest.split()[1] == VERSION
    elsewhere = [path for path in PACKAGE if f'"{VERSION}"' in (ROOT / path).read_text()]
    assert not elsewhere


@built
def test_the_wheel_is_the_package_and_nothing_else() -> None:
    with zipfile.ZipFile(wheel()) as archive:
        names = {name for name in archive.namelist() if not name.startswith(f"engm-{VERSION}.dist-info/")}
        assert not archive.testzip()
    extension = f"engm/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert names == PACKAGE | {extension}
    assert wheel().name.startswith(f"engm-{VERSION}-cp3")


@built
def test_the_source_distribution_can_be_compiled() -> None:
    (path,) = folder().glob("*.tar.gz")
    assert path.name == f"engm-{VERSION}.tar.gz"
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    needed = PACKAGE | sources("csrc", ".cpp", ".h", ".inl", ".cu", ".cuh", ".md")
    assert needed | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    generated = {"PKG-INFO", "setup.cfg", "MANIFEST.in"}
    assert not {name for name in names - needed - generated if "/" in name and not name.startswith("engm.egg-info/")}


def isolated(folder: Path) -> tuple[Path, Path]:
    """A new environment's Python and site-packages, with torch and the other dependencies lent by this one."""
    venv.create(folder, with_pip=False, symlinks=True)
    purelib = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder)}))
    # Put on the path as it is: the .pth file by which engm is installed here for development is not read again.
    (purelib / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python", purelib


@built
@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """A new environment, the wheel, and torch and the other dependencies lent by this one."""
    python, purelib = isolated(tmp_path / "venv")
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel()]
    subprocess.run([sys.executable, *install], check=True)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def run(*command: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ENGM_DIST")}
        done = subprocess.run(
            [python, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where, version = run("-c", "import engm; print(engm.__file__, engm.__version__)").split()
    assert Path(where) == purelib / "engm" / "__init__.py"
    assert version == VERSION
    script = tmp_path / "venv" / "bin" / "engm"
    assert "train" in run(str(script), "--help")
    assert " passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in TRIED))


def test_a_script_above_a_clone_finds_the_package_and_not_the_clone(tmp_path: Path) -> None:
    """The clone's own folder is named engm too, and would be an empty namespace to a script beside it."""
    clone = tmp_path / "engm"
    shutil.copytree(ROOT / "engm", clone / "engm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # without setup.py nothing is compiled again
        shutil.copy(ROOT / name, clone)
    python, _ = isolated(tmp_path / "venv")
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([sys.executable, *install, "--editable", clone], check=True)
    script = tmp_path / "script.py"
    script.write_text("import engm\nprint(engm.GradNormModule.__name__, engm.__file__)\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["GradNormModule", str(clone / "engm" / "__init__.py")]
