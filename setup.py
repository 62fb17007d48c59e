"""Builds ``engm._C``: C++ always, CUDA whenever nvcc and a CUDA build of torch are there (a GPU need not be).

ENGM_CPU_ONLY=1      leaves CUDA out.
FORCE_CUDA=1         fails where CUDA cannot be compiled, instead of building for the CPU only.
TORCH_CUDA_ARCH_LIST overrides the architectures, by default 8.0 and 9.0+PTX.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


def toolkit_root() -> str | None:
    """The directory with nvcc's own bin/ and include/; nvcc on PATH may be a wrapper that lives elsewhere."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return os.environ[name]
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "/usr/local/cuda" if os.path.exists("/usr/local/cuda/bin/nvcc") else None
    dry = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", dry.stdout + dry.stderr, re.MULTILINE)
    return str(Path(top.group(1)).resolve()) if top else str(Path(nvcc).resolve().parent.parent)


CUDA_ROOT = toolkit_root()
if CUDA_ROOT is not None:
    os.environ["CUDA_HOME"] = CUDA_ROOT  # torch looks at it when cpp_extension is imported

import torch  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402


def with_cuda() -> bool:
    """Whether to compile CUDA; says so loudly when it is left out for want of a compiler."""
    if os.environ.get("ENGM_CPU_ONLY", "0") == "1":
        return False
    missing = [
        what
        for what, there in (
            ("nvcc (set CUDA_HOME)", CUDA_ROOT is not None and os.path.exists(os.path.join(CUDA_ROOT, "bin", "nvcc"))),
            ("a CUDA build of torch", torch.version.cuda is not None),
        )
        if not there
    ]
    if missing and os.environ.get("FORCE_CUDA", "0") == "1":
        sys.exit(f"FORCE_CUDA=1, but there is no {' and no '.join(missing)}")
    if missing:
        print(f"*** engm: no {' and no '.join(missing)}: BUILDING FOR THE CPU ONLY ***", file=sys.stderr)
    return not missing


def openmp_flags() -> list[str]:
    """The compiler flags that the loop of ``at::parallel_for`` needs, which is inline in torch's headers.

    Without ``-fopenmp`` a torch whose parallel backend is OpenMP runs that loop on one thread and says nothing. The
    linker does not get the flag: it would add the system's OpenMP runtime beside the one that torch loads, and the
    symbols are found in torch's.
    """
    backend = re.search(r"^ATen parallel backend: (.*)$", torch.__config__.parallel_info(), re.MULTILINE)
    if backend is None or backend.group(1).strip() != "OpenMP":
        return []
    # Apple's clang takes the flag behind its driver only.
    return ["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]


def extension():
    """The one compiled module."""
    cuda = with_cuda()
    sources = [str(path.relative_to(ROOT)) for folder in ("csrc", "csrc/cpu") for path in (ROOT / folder).glob("*.cpp")]
    macros = [("ENGM_TORCH_VERSION", torch.__version__)]
    flags = {"cxx": ["-O3", "-g0", "-Wall", "-ffp-contract=fast", "-fvisibility=hidden", *openmp_flags()]}
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
        sources += [
            str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").iterdir() if path.suffix in (".cu", ".cpp")
        ]
        macros += [
            ("ENGM_WITH_CUDA", "1"),
            ("ENGM_CUDA_VERSION", torch.version.cuda),
            ("ENGM_CUDA_ARCHITECTURES", re.sub(r"[;\s]+", " ", os.environ["TORCH_CUDA_ARCH_LIST"])),
        ]
        flags["nvcc"] = ["-O3", "--expt-relaxed-constexpr", "-Xptxas=-warn-spills"]
    kind = CUDAExtension if cuda else CppExtension
    headers = [
        str(p.relative_to(ROOT)) for pattern in ("*.h", "*.inl", "*.cuh") for p in ROOT.glob(f"csrc/**/{pattern}")
    ]
    return kind("engm._C", sorted(sources), define_macros=macros, extra_compile_args=flags, depends=headers)


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
