"""The committed picture of the floors is the one that its generator draws, and it cannot contradict the floors."""

from __future__ import annotations

import draw_architecture
import pytest
import test_architecture


def test_the_picture_is_the_generated_one() -> None:
    assert draw_architecture.PICTURE.read_text(encoding="utf-8") == draw_architecture.picture()


def test_the_floors_are_those_that_imports_are_held_to() -> None:
    assert tuple(set(floor) for floor in draw_architecture.floors()) == test_architecture.FLOORS


def test_what_the_floors_do_not_have_is_not_drawn() -> None:
    rooms = draw_architecture.floors()
    with pytest.raises(ValueError, match=r"look at \['cellar'\]"):
        draw_architecture.House([["cellar"], *rooms])
    with pytest.raises(ValueError, match=r"look at \['recipes'\]"):
        draw_architecture.House(rooms[:-1])
    with pytest.raises(ValueError, match="goes the wrong way"):
        draw_architecture.House(rooms[::-1])
