"""The code on the pages about other libraries runs, and trains."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerators import no_accelerator_stays
from torch import nn

import engm

DOCS = Path(__file__).resolve().parents[2] / "docs"
NEEDS = {
    "frameworks": "accelerate",
    "from_opacus": "torch",
    "from_backpack": "torch",
    "from_torch_func": "torch",
    "norms": "torch",
    "attacks": "torchattacks",
}
PEERS = {
    "torch": "torch",
    "BackPACK": "backpack-for-pytorch",
    **{name: name.lower() for name in ("Lightning", "Accelerate", "Transformers", "Opacus", "torchattacks", "foolbox")},
}
BLOCKS = [
    (page, block)
    for page in NEEDS
    for block in re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
]


@pytest.fixture
def _no_accelerator_stays() -> Iterator[None]:
    pytest.importorskip("accelerate")
    with no_accelerator_stays():
        yield


@pytest.mark.usefixtures("_no_accelerator_stays")
@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[page for page, _ in BLOCKS])
def test_code_of_the_page_runs(page: str, block: str) -> None:
    pytest.importorskip("foolbox" if "foolbox" in block else NEEDS[page])
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    model = engm.GradNormModule(net)
    names: dict[str, Any] = {
        "engm": engm, "torch": torch, "F": F, "net": net, "model": model, "x": torch.rand(8, 3, 8, 8),
        "y": torch.randint(10, (8,)), "loader": [(torch.rand(4, 3, 8, 8), torch.randint(10, (4,)))],
        "sgd": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    }  # fmt: skip
    before = [parameter.detach().clone() for parameter in net.parameters()]
    exec(block, names)
    trains = "step()" in block
    assert all(torch.equal(b, p) != trains for b, p in zip(before, net.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_there_is_code_on_every_page() -> None:
    assert {page for page, _ in BLOCKS} == set(NEEDS)


@pytest.mark.parametrize("page", [page for page in NEEDS if page != "norms"])
def test_versions_on_the_page_are_those_that_are_tested(page: str) -> None:
    pins = (DOCS.parent / "requirements-dev.txt").read_text() + (DOCS.parent / "Makefile").read_text()
    oldest_last = re.findall(r"([\w-]+)==([\d.]+)", pins)  # of torch there are two
    pinned = dict(reversed(oldest_last))
    text = " ".join((DOCS / f"{page}.md").read_text().split())
    found = re.findall(rf"\b({'|'.join(PEERS)}) (\d+\.\d+\.\d+)", text)
    assert found
    for name, version in found:
        assert version == pinned[PEERS[name]], name
