"""A kernel that breaks the CUDA context breaks every later test of its process: such a process ends here.

And a kernel that failed its trials is replaced by torch's operators, which would pass its tests: each fails then.
"""

import os
import sys
import time

import pytest
import torch
from device_cases import ON_CUDA

import engm


def context_error():
    """What the context died of, or None."""
    if not (ON_CUDA and torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return str(error).splitlines()[0]
    return None


@pytest.fixture(autouse=True)
def _of_kernels():
    yield
    assert engm.build_info()["distrusted"] == [], "torch's operators took the place of a kernel"


@pytest.fixture(autouse=True)
def _ends_with_its_context(request):
    yield
    error = context_error()
    if error is None:
        return
    print(f"\nthe CUDA context died in {request.node.nodeid}: {error}", file=sys.stderr, flush=True)
    if "PYTEST_XDIST_WORKER" in os.environ:  # another worker takes over (pytest -n 1 is enough)
        time.sleep(1)  # the test's own report has to get out first
        os._exit(3)
    pytest.exit("the CUDA context is dead, so nothing more can be tested in this process; use pytest -n 1", 3)
