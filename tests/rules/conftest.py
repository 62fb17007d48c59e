"""What the tests of modules that are run again share."""

import pytest

from engm import module
from engm.graph import planning
from engm.rules import fallback


@pytest.fixture
def run_again(monkeypatch):
    """The names of the types of the modules that the engine runs again, in order."""
    found = []
    terms = fallback.GenericRule.terms

    def noted(self, module, *rest):
        found.append(type(module).__name__)
        return terms(self, module, *rest)

    monkeypatch.setattr(fallback.GenericRule, "terms", noted)
    return found


@pytest.fixture
def preferred(monkeypatch):
    """The engine runs modules again, which it does in compiled regions alone."""
    monkeypatch.setattr(module, "dynamo_in_use", lambda: True)
    monkeypatch.setattr(planning, "account_by_operators", lambda calls: set())
