"""Random programs on tensors whose examples lie along any dimension: norms and updates are right, at every step."""

from __future__ import annotations

import pytest
from hostile.oriented import failures

PROGRAMS = 8  # of one test; `python tests/hostile/oriented.py` runs any others


@pytest.mark.parametrize("first", range(0, 10 * PROGRAMS, PROGRAMS))
def test_norms_and_updates(first):
    found = {seed: list(failures(seed)) for seed in range(first, first + PROGRAMS)}
    assert not any(found.values()), found
