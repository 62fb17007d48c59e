"""What was compiled into the extension, and that its instruction sets can be forced and agree."""

import os
import re
import subprocess
import sys

import pytest
import torch

import engm
from engm import _C, ops


def test_build_info_says_what_is_there():
    info = engm.build_info()
    assert info["cpu_isa"] in info["cpu_isas"]
    assert info["cpu_isas"][-1] == "baseline"
    assert info["cuda"] in (True, False)
    assert bool(info["cuda_architectures"]) == info["cuda"]
    assert _C.build_info()["torch"].split(".")[:2] == torch.__version__.split(".")[:2]


def test_operators_have_the_parallel_backend_of_torch():
    backends = {"OpenMP": "OpenMP", "native thread pool": "native"}
    (name,) = re.findall(r"^ATen parallel backend: (.*)$", torch.__config__.parallel_info(), re.MULTILINE)
    assert engm.build_info()["cpu_parallel"] == backends[name]


def test_instruction_sets_agree():
    x, gy = torch.randn(3, 20, 9, 9), torch.randn(3, 13, 9, 9)
    norms = []
    try:
        for isa in _C.build_info()["cpu_isas"]:
            _C.set_isa(isa)
            assert _C.build_info()["cpu_isa"] == isa
            norms.append(ops.conv_norm_sq(x, gy, [3, 3], [1, 1], [1, 1], [1, 1]))
    finally:
        _C.set_isa("auto")
    for other in norms[1:]:
        torch.testing.assert_close(other, norms[0], rtol=1e-5, atol=0)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="'mmx' is not available"):
        _C.set_isa("mmx")


def test_the_environment_forces_an_instruction_set():
    code = "from engm import _C; print(_C.build_info()['cpu_isa'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ENGM_CPU_ISA": "baseline"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "baseline"
