"""The rules of operators on torch's own examples of calls, see tests/support/torchs_examples.py."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "support" / "torchs_examples.py"


@pytest.mark.slow
@pytest.mark.torch_insides
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_rules_on_torchs_own_examples(dtype):
    pytest.importorskip("expecttest", reason="torch's list of operators needs it")
    run = subprocess.run([sys.executable, str(PROGRAM), dtype], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "are right" in run.stdout
