"""python benchmarks/gpu/run.py --out DIR [--stages ceilings,kernels,...] [--seconds 480] [--data CIFAR10.npz]."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(BENCHMARKS), str(BENCHMARKS.parent)]  # not this directory; engm may be built in place

from gpu.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
