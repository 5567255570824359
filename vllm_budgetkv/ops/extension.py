"""Loads the compiled CPU kernels, `torch.ops.budgetkv.*`."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from vllm_budgetkv.ops.backend import BACKEND_VARIABLE


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
