"""Builds the CPU kernels, `vllm_budgetkv/_C.abi3.so`, from `csrc/*.cpp`.

`BUDGETKV_NO_EXT=1` builds the package without them. No file is compiled for the build machine's own
instruction set: the kernels hold one copy per instruction set and choose at run time.
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
COMPILE_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wno-psabi", "-g0"]
# without it at::parallel_for, which is inlined from torch's headers, runs on one thread; the
# library found at run time is the one that torch has loaded already
OPENMP_FLAGS = ["-fopenmp"]


def kernel_options() -> dict[str, object]:
    """The arguments of `setup` that describe the extension; empty without it."""
    if os.environ.get("BUDGETKV_NO_EXT", "0") not in ("", "0"):
        return {}
    # Imported here, because a build without the extension must not need torch.
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension(
        name="vllm_budgetkv._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.[hi]*")),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": COMPILE_FLAGS + OPENMP_FLAGS},
        extra_link_args=OPENMP_FLAGS,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**kernel_options())
