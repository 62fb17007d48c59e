"""Settings that hold for every test: reproducible draws, one seed a test."""

import os

os.environ["ENGM_COST_TABLE"] = "built-in"  # a developer's own table must not change which forms the tests take

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "engm",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("engm")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
