"""Kernels are tried on first use, and torch computes in the place of one that fails."""

import json
import os
import subprocess
import sys

import pytest
import torch
from emulator.build import ROOT
from emulator.mutation_table import MUTATIONS
from emulator.mutations import build_mutants

from engm import reference


@pytest.fixture
def on_probation(emulator_library):
    """The verdicts on the kernels that were used since, as ``{(kernel, precision): verdict}``."""
    emulator_library.put_on_probation(1)

    def verdicts():
        lines = emulator_library.verdicts().decode().splitlines()
        return {tuple(line.split("\t")[:2]): line.split("\t")[2] for line in lines}

    yield verdicts
    emulator_library.put_on_probation(0)


def test_a_kernel_is_tried_when_it_is_first_used(kernels, on_probation):
    assert on_probation() == {}
    a, b = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    kernels.linear_norm_sq(a, b, "direct")
    assert on_probation() == {("gemm_norm", "float32"): "trusted"}
    kernels.linear_norm_sq(a.double(), b.double(), "gram")
    kernels.linear_norm_sq(a[:, :1].double(), b[:, :1].double(), "gram")
    tried = {
        ("gemm_norm", "float64"),
        ("gram_contraction", "float64"),
        ("rank_one", "float64"),
        ("gemm_norm", "float32"),
    }
    assert on_probation() == dict.fromkeys(tried, "trusted")


def test_every_kernel_in_every_precision_is_tried_and_trusted(emulator_library, on_probation):
    emulator_library.self_test()
    found = on_probation()
    matrices = (
        "gemm_norm",
        "conv_norm",
        "depthwise_norm",
        "gram_norm",
        "gram_contraction",
        "rank_one",
        "weighted_gemm",
    )
    others = ("affine_norm", "correction", "embedding_norm", "weighting")
    wide, narrow = ("float64", "float32"), ("bfloat16", "float16")
    expected = {(kernel, precision) for kernel in matrices for precision in (*wide, *narrow, "tf32")}
    expected |= {(kernel, precision) for kernel in others for precision in (*wide, *narrow)}
    expected |= {("clip_weights", precision) for precision in wide}
    assert found == dict.fromkeys(expected, "trusted")


@pytest.mark.parametrize("autocast", [False, True])
def test_a_trial_leaves_generators_and_results_alone(kernels, on_probation, autocast):
    a, b = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    before = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = kernels.linear_norm_sq(a, b, "direct")
    assert torch.equal(torch.get_rng_state(), before)
    assert set(on_probation().values()) == {"trusted"}
    torch.testing.assert_close(got, reference.linear_norm_sq(a, b))


WRONG_KERNEL = """
import ctypes, json, sys
import torch
torch.ops.load_library(sys.argv[1])
library = ctypes.CDLL(sys.argv[1])
library.set_mutant(int(sys.argv[2]))
library.put_on_probation(1)
a, b = torch.randn(2, 150, 40), torch.randn(2, 150, 72)
got = [torch.ops.engm_emulated.linear_norm_sq(a, b, "direct") for _ in range(2)]
got.append(torch.ops.engm_emulated.linear_norm_sq(a.double(), b.double(), "direct").float())
print(json.dumps([float((g - (a.transpose(1, 2) @ b).square().sum((1, 2))).abs().max() / g.max()) for g in got]))
"""


@pytest.mark.slow
def test_one_warning_names_a_wrong_kernel_and_torch_computes_in_its_place():
    (mutation,) = [m for m in MUTATIONS if m.name == "tf32x3: no low part of a"]
    command = [sys.executable, "-c", WRONG_KERNEL, str(build_mutants(MUTATIONS)), str(mutation.number)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    (warning,) = [line for line in done.stderr.splitlines() if "engm: " in line]  # float64 has no such part
    assert "the kernel gemm_norm in float32 is wrong on cpu" in warning
    assert "ATen's operators compute in its place" in warning
    assert max(json.loads(done.stdout.splitlines()[-1])) < 1e-6
