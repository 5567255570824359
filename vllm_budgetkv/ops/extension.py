"""Loads the compiled CPU kernels, `torch.ops.budgetkv.*`, and says whether to use them."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

BACKEND_VARIABLE = "VLLM_BUDGETKV_OPS"


@cache
def load() -> None:
    """Register the compiled kernels with torch. Later calls do nothing.

    Raises:
        ImportError: the package was built without them.
    """
    spec = find_spec("vllm_budgetkv._C")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the compiled kernels vllm_budgetkv/_C*.so are missing: build them with "
            "`pip install -e . --no-build-isolation` (needs g++ 12 or later), "
            f"or set {BACKEND_VARIABLE}=reference for the slow plain torch ops"
        )
    torch.ops.load_library(spec.origin)


@cache
def use_reference() -> bool:
    """Whether the plain torch references replace the kernels. Decided once per process.

    Raises:
        ValueError: the environment variable has an unknown value.
    """
    backend = os.environ.get(BACKEND_VARIABLE, "kernels")
    if backend not in ("kernels", "reference"):
        raise ValueError(
            f"{BACKEND_VARIABLE}={backend} is not a backend: set it to kernels or reference"
        )
    return backend == "reference"
