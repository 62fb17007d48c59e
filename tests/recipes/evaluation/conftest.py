"""One little run, trained once, for all tests of evaluations."""

from __future__ import annotations

import pytest
from evaluation_runs import Trained, train_in


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_in(tmp_path_factory.mktemp("evaluated"))
