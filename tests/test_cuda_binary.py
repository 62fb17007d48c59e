"""What nvcc made of the kernels, read from the built extension: both architectures, no spills, no atomics.

Nothing here needs a GPU; it needs a build with CUDA and cuobjdump (the toolkit's, or the one in triton's package).
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

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


def cuobjdump():
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))


pytestmark = [
    pytest.mark.skipif(not _C.build_info()["cuda"], reason="the extension was built for the CPU only"),
    pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is neither on PATH nor in triton's package"),
]


def dump(*options):
    done = subprocess.run([cuobjdump(), *options, _C.__file__], capture_output=True, text=True, check=True)
    return done.stdout


def kernel_name(mangled):
    """``gram_norm_kernel`` of ``_ZN4engm4cuda16gram_norm_kernel...``."""
    found = re.search(r"cuda(?:12_GLOBAL__N_1)?(\d+)(\w+)", mangled)
    assert found is not None, mangled
    return found.group(2)[: int(found.group(1))]


@pytest.fixture(scope="module")
def resources():
    """(architecture, mangled name) -> {"REG": 255, "STACK": 0, ...}"""
    found, architecture, function = {}, None, None
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match.group(1)
        elif match := re.search(r"Function (\S+):", line):
            function = match.group(1)
        elif "REG:" in line:
            found[architecture, function] = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
    return found


def test_every_kernel_is_there_for_both_architectures(resources):
    kernels = defaultdict(set)
    for architecture, function in resources:
        kernels[architecture].add(function)
    wanted = [a for a in ARCHITECTURES if a.replace("sm_", "")[0] + ".0" in _C.build_info()["cuda_architectures"]]
    assert wanted, "built for other architectures than the ones that are checked"
    families = {kernel_name(function) for function in kernels[wanted[0]]}
    assert {"direct_norm_kernel", "gram_norm_kernel", "depthwise_norm_kernel", "clip_weights_kernel"} <= families
    for architecture in wanted:
        assert kernels[architecture] == kernels[wanted[0]]


def test_no_kernel_spills(resources):
    assert not {key: use for key, use in resources.items() if use["STACK"] or use["LOCAL"]}


def test_registers_stay_under_their_ceilings(resources):
    over = {
        key: use["REG"]
        for key, use in resources.items()
        if use["REG"] > CEILING.get(kernel_name(key[1]), USUAL_CEILING)
    }
    assert not over


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_uses_atomics(architecture):
    """Results are the same bits on every run; sums go through memory in a fixed order."""
    if architecture.replace("sm_", "")[0] + ".0" not in _C.build_info()["cuda_architectures"]:
        pytest.skip(f"not built for {architecture}")
    code = dump("-sass", "-arch", architecture)
    assert "HMMA" in code
    assert "LDGSTS" in code
    assert not re.findall(r"\b(?:ATOM|ATOMG|ATOMS|RED|REDG|REDS)\b.*", code)
