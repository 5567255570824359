"""Stock vLLM on a CPU with 8-bit keys and values rounded to the nearest number, as on a GPU.

Its own kernel for CPUs (`cpu_attn_reshape_and_cache` of 0.32) cuts towards zero: -1.089 becomes
-1.0, where -1.125 is nearer. What it is handed here lies just above the number that it shall find.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from tests.e2e.devices import ON_GPU
from vllm_budgetkv.ops.reference.quantise import quantise

if TYPE_CHECKING:
    from collections.abc import Iterator

# more than a rounding step of the dtype, and far less than what is cut off
ABOVE = {torch.float32: 1 + 1e-4, torch.bfloat16: 1 + 1e-2, torch.float16: 1 + 2e-3}


@contextmanager
def to_nearest() -> Iterator[None]:
    """Let vLLM's kernel for CPUs round while a stock engine runs in this process."""
    if ON_GPU:
        yield
        return
    from vllm import _custom_ops

    cut = _custom_ops.cpu_attn_reshape_and_cache

    def store(
        key: torch.Tensor,
        value: torch.Tensor,
        *rest: Any,
        k_scale: float,
        v_scale: float,
        **how: Any,
    ) -> None:
        above = ABOVE[key.dtype]
        rounded = zip(quantise(key, value, k_scale, v_scale), (k_scale, v_scale), strict=True)
        key, value = ((found.float() * scale * above).to(key.dtype) for found, scale in rounded)
        cut(key, value, *rest, k_scale=k_scale, v_scale=v_scale, **how)

    with mock.patch.object(_custom_ops, "cpu_attn_reshape_and_cache", store):
        yield
