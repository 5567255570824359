"""Which implementation of the ops serves a tensor: reference, C++ or Triton.

An op's file imports its Triton launcher inside the branch that calls it, so that the package needs
Triton only where a GPU is.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    import torch

Backend = Literal["reference", "cpp", "triton"]

BACKEND_VARIABLE = "VLLM_BUDGETKV_OPS"
INTERPRETER_VARIABLE = "TRITON_INTERPRET"


def of(tensor: torch.Tensor) -> Backend:
    """The implementation for ops on this tensor: Triton on a GPU, C++ on a CPU.

    `VLLM_BUDGETKV_OPS` set to reference or triton decides for every tensor, once per process.

    Raises:
        ValueError: the environment variable has an unknown value.
        RuntimeError: it asks for Triton on the CPU without Triton's interpreter.
    """
    chosen = _chosen()
    if chosen == "kernels":
        return "triton" if tensor.is_cuda else "cpp"
    if chosen == "triton" and not tensor.is_cuda:
        _require_interpreter()
    return cast("Backend", chosen)


@cache
def _chosen() -> str:
    backend = os.environ.get(BACKEND_VARIABLE, "kernels")
    if backend not in ("kernels", "reference", "triton"):
        raise ValueError(
            f"{BACKEND_VARIABLE}={backend} is not a backend: set it to kernels, reference or triton"
        )
    return backend


@cache
def _require_interpreter() -> None:
    if os.environ.get(INTERPRETER_VARIABLE) != "1":
        raise RuntimeError(
            f"{BACKEND_VARIABLE}=triton runs on a CPU under Triton's interpreter only: set "
            f"{INTERPRETER_VARIABLE}=1 before anything imports triton"
        )
