"""The reference has every public name; that its pages hold together is for ``make docs`` to say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import engm

PAGES = Path(__file__).resolve().parents[2] / "docs" / "api"
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
DOCUMENTED = {name for page in PAGES.glob("*.md") for name in DIRECTIVE.findall(page.read_text())}


@pytest.mark.parametrize("name", sorted(set(engm.__all__) - {"__version__"}))
def test_every_public_name_is_in_the_reference(name: str) -> None:
    assert {f"engm.{name}", f"engm.{name}.{name}"} & DOCUMENTED
