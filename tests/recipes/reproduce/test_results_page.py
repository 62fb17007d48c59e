"""The committed pages of results say what the committed JSON says, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from write_results_page import (
    INTRODUCTION,
    LINK,
    NUMBERS,
    NUMBERS_INTRODUCTION,
    NUMBERS_TITLE,
    PICTURE,
    REPRODUCE,
    TITLE,
)

from engm.recipes.reproduce.numbers import numbers_page
from engm.recipes.reproduce.page import documents, page, table_block, with_block

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "results"


def test_the_page_is_the_generated_one() -> None:
    found = documents(RESULTS)
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == page(found, TITLE, INTRODUCTION)
    for name, document in found.items():
        assert document["budget"] == "small"
        assert (RESULTS / name / "picture.svg").is_file()


def test_the_page_of_every_number_is_the_generated_one() -> None:
    text = NUMBERS.read_text(encoding="utf-8")
    assert text == numbers_page(documents(RESULTS), NUMBERS_TITLE, NUMBERS_INTRODUCTION)


def test_the_guide_has_the_generated_table() -> None:
    guide = REPRODUCE.read_text(encoding="utf-8")
    block = table_block(documents(RESULTS)["table2"], PICTURE, LINK)
    assert with_block(guide, block) == guide
    assert with_block(guide, block.replace("MSGD", "SGD")) != guide
    assert all((REPRODUCE.parent / target).is_file() for target in (PICTURE, LINK))
    with pytest.raises(ValueError, match="no part between"):
        with_block("# engm", block)


def test_no_path_of_a_machine_is_published() -> None:
    for path in RESULTS.rglob("*"):
        if path.suffix in (".json", ".toml", ".csv", ".md"):
            text = path.read_text(encoding="utf-8")
            assert "/tmp/" not in text
            assert "data_root" not in text
