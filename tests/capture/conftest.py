"""What the tests of captured calls share."""

import pytest
import torch


@pytest.fixture
def nothing_compiled():
    """Compiled code is forgotten before the test and after it."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
