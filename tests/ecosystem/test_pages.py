"""The code on the pages about other libraries runs, and trains."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import engm

DOCS = Path(__file__).resolve().parents[2] / "docs"
NEEDS = {"frameworks": "accelerate", "from_opacus": "torch", "attacks": "torchattacks"}
BLOCKS = [
    (page, block)
    for page in NEEDS
    for block in re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
]


@pytest.fixture
def _no_accelerator_stays() -> Iterator[None]:
    yield
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


@pytest.mark.usefixtures("_no_accelerator_stays")
@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[page for page, _ in BLOCKS])
def test_code_of_the_page_trains(page: str, block: str) -> None:
    pytest.importorskip("foolbox" if "foolbox" in block else NEEDS[page])
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    model = engm.GradNormModule(net)
    names: dict[str, Any] = {
        "engm": engm, "torch": torch, "F": F, "model": model, "x": torch.rand(8, 3, 8, 8),
        "y": torch.randint(10, (8,)), "loader": [(torch.rand(4, 3, 8, 8), torch.randint(10, (4,)))],
        "sgd": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    }  # fmt: skip
    before = [parameter.detach().clone() for parameter in net.parameters()]
    exec(block, names)
    assert all(not torch.equal(b, p) for b, p in zip(before, net.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("page", NEEDS)
def test_versions_on_the_page_are_those_that_are_tested(page: str) -> None:
    pins = (DOCS.parent / "requirements-dev.txt").read_text() + (DOCS.parent / "Makefile").read_text()
    pinned = dict(re.findall(r"([\w-]+)==([\d.]+)", pins))
    found = re.findall(
        r"\b(Lightning|Accelerate|Opacus|torchattacks|foolbox) (\d+\.\d+\.\d+)", (DOCS / f"{page}.md").read_text()
    )
    assert found
    for name, version in found:
        assert version == pinned[name.lower()], name
