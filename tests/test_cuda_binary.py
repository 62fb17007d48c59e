"""What nvcc made of the kernels, read from the built extension: both architectures, no spills, no atomics.

Nothing here needs a GPU; it needs a build with CUDA and cuobjdump (the toolkit's, or the one in triton's package).
"""

import re
from pathlib import Path

import disassembly
import pytest

from engm import _C

ARCHITECTURES = ("sm_80", "sm_90")
# Registers a thread may use: what its block size and the blocks that should share a multiprocessor allow.
CEILING = {
    "direct_norm_kernel": 255,  # 256 threads, one block: 144 sums a thread in the 3×3 tile
    "gram_norm_kernel": 255,
    "weighted_gemm_kernel": 255,
}
USUAL_CEILING = 128


def has_cuobjdump():
    try:
        return bool(disassembly.cuobjdump())
    except FileNotFoundError:
        return False


pytestmark = [
    pytest.mark.skipif(not _C.build_info()["cuda"], reason="the extension was built for the CPU only"),
    pytest.mark.skipif(not has_cuobjdump(), reason="cuobjdump is neither on PATH nor in triton's package"),
]


def built_for(architecture):
    return architecture.replace("sm_", "")[0] + ".0" in _C.build_info()["cuda_architectures"]


@pytest.fixture(scope="module")
def resources():
    """What every kernel takes, by architecture."""
    wanted = [architecture for architecture in ARCHITECTURES if built_for(architecture)]
    assert wanted, "built for other architectures than the ones that are checked"
    return {architecture: disassembly.resources([Path(_C.__file__)], architecture) for architecture in wanted}


def test_every_kernel_is_there_for_both_architectures(resources):
    kernels = {architecture: {use.name for use in found} for architecture, found in resources.items()}
    families = {use.family for found in resources.values() for use in found}
    assert {"direct_norm_kernel", "gram_norm_kernel", "depthwise_norm_kernel", "clip_weights_kernel"} <= families
    assert len(set(map(frozenset, kernels.values()))) == 1


def test_no_kernel_spills(resources):
    assert not [use for found in resources.values() for use in found if use.spills]


def test_registers_stay_under_their_ceilings(resources):
    uses = [use for found in resources.values() for use in found]
    assert not [use for use in uses if use.registers > CEILING.get(use.family, USUAL_CEILING)]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_uses_atomics(architecture, machine_code_of):
    """Results are the same bits on every run; sums go through memory in a fixed order."""
    if not built_for(architecture):
        pytest.skip(f"not built for {architecture}")
    code = machine_code_of(architecture)
    assert "HMMA" in code
    assert "LDGSTS" in code
    assert not re.findall(r"\b(?:ATOM|ATOMG|ATOMS|RED|REDG|REDS)\b.*", code)
