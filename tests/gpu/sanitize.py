"""Every operator on odd shapes under compute-sanitizer: memory accesses, shared-memory races, barriers.

    python tests/gpu/sanitize.py                         all three tools
    python tests/gpu/sanitize.py --tools memcheck        one of them
    python tests/gpu/sanitize.py --inside                the operators alone, as the tools run them

Each tool runs this file again. With ENGM_TEST_DEVICE=cpu there is no tool, and what it would run is rehearsed on the
CPU. torch's caching allocator is off meanwhile, so that an access past the end of a tensor leaves its allocation; only
kernels of engm are instrumented.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(Path(__file__).parent), str(ROOT)]  # engm may be built in place

TOOLS = ("memcheck", "synccheck", "racecheck")  # the slow one last
FOLDERS = ("bin", "compute-sanitizer")  # of a toolkit
DTYPES = {
    "memcheck": ("float32", "float64", "bfloat16", "float16"),
    "synccheck": ("float32", "float64", "bfloat16"),
    # It is slow: one 4-byte and one 2-byte type have to do, since tiles of the others are laid out alike.
    "racecheck": ("float32", "bfloat16"),
}


REHEARSAL = os.environ.get("ENGM_TEST_DEVICE") == "cpu"


def instrumented(tool: str) -> list[str]:
    """The command that instruments the command behind it.

    Raises:
        SystemExit: compute-sanitizer is not there, or there is no GPU.
    """
    if REHEARSAL:
        print("(no GPU is asked for: the operators run without the tool)", flush=True)
        return []
    return [
        sanitizer(), "--tool", tool, "--kernel-name", "kns=engm", "--error-exitcode", "3", "--print-limit", "30",
        "--report-api-errors", "no", "--launch-timeout", "120",
        *(["--padding", "64"] if tool == "memcheck" else []),
    ]  # fmt: skip


def sanitizer() -> str:
    """Path of compute-sanitizer.

    Raises:
        SystemExit: it is not there, or there is no GPU; says which.
    """
    import torch

    if not torch.cuda.is_available():
        sys.exit("compute-sanitizer needs a CUDA device, and torch sees none here.")
    for candidate in (
        os.environ.get("COMPUTE_SANITIZER"),
        shutil.which("compute-sanitizer"),
        *(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/{folder}/compute-sanitizer" for folder in FOLDERS),
    ):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    return sys.exit(
        "There is no compute-sanitizer, which comes with the CUDA toolkit: put it on PATH, or its path into "
        "COMPUTE_SANITIZER."
    )


def inside(dtypes: list[str]) -> None:
    """Every operator once in each type and, for float32, with TF32 and without."""
    import torch
    from device_cases import every_operator, tf32

    for name in dtypes:
        dtype = getattr(torch, name)
        for allowed in (True, False) if dtype == torch.float32 else (False,):
            for case in every_operator(dtype):
                with tf32(allowed):
                    case.run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                print(f"{name}{' tf32' if allowed else ''}: {case}", flush=True)


def main() -> None:
    """Runs the tools one after the other; exits with 1 if any of them found something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--dtypes", nargs="+", help="default: those of the tool")
    parser.add_argument("--seconds", type=float, default=600, help="of each tool, at most")
    parser.add_argument("--inside", action="store_true", help="no tool: run the operators in this process")
    arguments = parser.parse_args()
    if arguments.inside:
        return inside(arguments.dtypes or list(DTYPES["memcheck"]))
    failed = []
    for tool in arguments.tools:
        inner = [sys.executable, __file__, "--inside", "--dtypes", *(arguments.dtypes or DTYPES[tool])]
        command = instrumented(tool) + inner
        print("==", tool, flush=True)
        running = subprocess.Popen(
            command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, start_new_session=True
        )
        try:
            status = running.wait(arguments.seconds)
            outcome = "" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"not finished after {arguments.seconds:.0f} s"
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)  # the tool's own child would live on, and hold the GPU
                running.wait()
        print(f"== {tool}: {outcome or 'no error found'}", flush=True)
        if outcome:
            failed.append(f"{tool} ({outcome})")
    if failed:
        sys.exit(f"compute-sanitizer complained: {', '.join(failed)}")
    return None


if __name__ == "__main__":
    main()
