"""Settings that hold for every test: reproducible draws, one seed a test, and no slow test without its mark."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["ENGM_COST_TABLE"] = "built-in"  # a developer's own table must not change which forms the tests take

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

settings.register_profile(
    "engm",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("engm")

BEGUN = pytest.StashKey[float]()


@pytest.fixture(scope="module", autouse=True)
def _nothing_of_other_modules_to_collect():
    """What earlier modules left is out of the garbage collector's sight: it would walk through all of it every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def machine_code_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The built extension's machine code by architecture: cuobjdump takes half a minute, once for all workers."""
    import disassembly  # not for all tests: those of the oldest torch have no folder of tools beside them

    from engm import _C

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose folder is in that of the whole session
        folder = folder.parent

    def read(architecture: str) -> str:
        path = folder / f"machine_code_{architecture}"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_text(disassembly.disassembled(Path(_C.__file__), architecture))
        return path.read_text()

    return read


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--most-seconds",
        type=float,
        help="fail a test without the mark 'slow' that takes more processor time than this, its fixtures included",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first, so that in the end no worker waits long for another."""
    items.sort(key=lambda item: "slow" not in item.keywords)


def pytest_collection_finish() -> None:
    """Takes what is loaded by now out of the garbage collector's sight, so that tests which call it wait less."""
    gc.collect()
    gc.freeze()


def processor_seconds() -> float:
    """What this process and those that it waited for have used: on a busy machine hardly more than on an idle one."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[BEGUN] = processor_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    allowed = item.config.getoption("most_seconds")
    if report.when == "teardown" and report.passed and allowed is not None and "slow" not in item.keywords:
        taken = processor_seconds() - item.stash[BEGUN]
        if taken > allowed:
            report.outcome = "failed"
            report.longrepr = (
                f"{item.nodeid} took {taken:.0f} seconds of processor time, its fixtures included. Make it cheaper, or "
                "mark it with @pytest.mark.slow: 'make test' has room for tests of up to ten seconds."
            )
    return report
