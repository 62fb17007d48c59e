"""examples/distributed.py trains under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "distributed.py"


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_example_trains_in_two_processes() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # two processes need two GPUs, or none
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=300)
    assert found.stdout.count("clipped") == 3, "rank 0 alone prints"
    accuracy = re.search(r"2 processes, training accuracy (\d+\.\d)%", found.stdout)
    assert accuracy, found.stdout
    assert float(accuracy[1]) > 90
