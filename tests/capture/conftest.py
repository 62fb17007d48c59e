"""What the tests of captured calls share."""

import pytest
import torch


@pytest.fixture
def nothing_compiled():
    """Compiled code of other tests is forgotten before a test, and that of the test after it."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
