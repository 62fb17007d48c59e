"""The CUDA operators, run by the emulator."""

import pytest
import torch
from emulator.build import build_operators


@pytest.fixture(scope="session")
def emulated():
    """``torch.ops.engm_emulated``: the CUDA bindings and kernels for CPU tensors, compiled on first use."""
    torch.ops.load_library(str(build_operators()))
    return torch.ops.engm_emulated
