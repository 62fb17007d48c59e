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


def test_the_self_test_tries_every_family_of_kernels():
    report = engm.self_test("cpu")
    assert report.ok, str(report)
    families = {trial.kernel for trial in report.trials}
    assert {"gemm_norm", "conv_norm", "gram_norm", "affine_norm", "embedding_norm", "weighting"} <= families
    assert {trial.precision for trial in report.trials} == {"float64", "float32", "bfloat16", "float16"}
    assert engm.build_info()["distrusted"] == []
    assert engm.self_test().device == ("cuda:0" if torch.cuda.is_available() and engm.build_info()["cuda"] else "cpu")


def test_the_self_test_of_no_such_device():
    with pytest.raises(RuntimeError, match="engm has no kernels for meta in this build"):
        engm.self_test("meta")


def test_what_failed_shows_in_report_and_build_info(monkeypatch):
    rows = [
        ("gram_norm", "tf32", "linear_norm_sq, T = 100", 0.3, 1e-5, ""),
        ("gram_norm", "tf32", "linear_norm_sq, T = 20", 1e-7, 1e-5, ""),
        ("rank_one", "tf32", "linear_norm_sq, T = 1", 0.0, 1e-5, "the CUDA launch failed: no kernel image"),
        ("rank_one", "float64", "linear_norm_sq, T = 1", 1e-16, 1e-12, ""),
    ]
    monkeypatch.setattr(_C, "self_test", lambda device: rows)
    report = engm.self_test("cpu")
    assert not report.ok
    assert [trial.problem for trial in report.failed] == ["linear_norm_sq, T = 100", "linear_norm_sq, T = 1"]
    lines = str(report).splitlines()
    assert len(lines) == 2 + 3
    assert lines[2].endswith("WRONG: linear_norm_sq, T = 100")
    assert lines[3].endswith("WRONG: the CUDA launch failed: no kernel image")
    assert "WRONG" not in lines[4]
    monkeypatch.setattr(_C, "distrusted", lambda device: [("gram_norm", "tf32", "error 0.3")])
    assert engm.build_info()["distrusted"] == ["cpu: gram_norm in tf32 (error 0.3)"]
    stats = engm.StepStats(torch.ones(2), torch.ones(2))
    assert stats.through_torch == ("gram_norm in tf32 (error 0.3)",)
