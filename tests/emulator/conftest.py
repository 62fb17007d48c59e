"""The CUDA operators, run by the emulator, and what computes in the place of kernels that failed their trials."""

import ctypes

import pytest
import torch
from emulator.build import build_operators


@pytest.fixture(autouse=True)
def _torchs_own_precision():
    """The switches for TF32 as torch has them at first: a training run of another test may have left its own."""
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


@pytest.fixture(scope="session")
def emulator_library():
    """The library of the emulated operators, loaded; compiled on first use."""
    path = str(build_operators())
    torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    library.verdicts.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="session", params=["kernels", "through ATen, one example at a time"])
def emulated(request, emulator_library):
    """Operators for CPU tensors: the CUDA bindings and kernels, or torch's operators in their place."""
    if request.param == "kernels":
        yield torch.ops.engm_emulated
        return
    emulator_library.form_at_once(ctypes.c_int64(1))
    yield torch.ops.engm_through_aten
    emulator_library.form_at_once(ctypes.c_int64(1 << 26))


@pytest.fixture(scope="session")
def kernels(emulator_library):
    """``torch.ops.engm_emulated``: the CUDA bindings and kernels for CPU tensors."""
    return torch.ops.engm_emulated
