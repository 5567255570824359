"""`quantise` in Triton: one launch, for keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from vllm_budgetkv.arithmetic.layout import QUANTISED_DTYPE
from vllm_budgetkv.ops.triton.arguments import Tokens
from vllm_budgetkv.ops.triton.precision import round_to

if TYPE_CHECKING:
    import torch

BLOCK_TOKENS = 16


def quantise(
    key: torch.Tensor, value: torch.Tensor, key_unit: float, value_unit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vllm_budgetkv.ops.quantise.quantise`."""
    num_tokens, num_heads, head_size = key.shape
    stored_key, stored_value = (key.new_empty(key.shape, dtype=QUANTISED_DTYPE) for _ in range(2))
    if key.numel() == 0:
        return stored_key, stored_value
    quantise_kernel[(triton.cdiv(num_tokens, BLOCK_TOKENS), num_heads)](
        Tokens.of(key),
        Tokens.of(value),
        Tokens.of(stored_key),
        Tokens.of(stored_value),
        float(key_unit),
        float(value_unit),
        num_tokens,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=triton.next_power_of_2(head_size),
        BLOCK_TOKENS=BLOCK_TOKENS,
    )
    return stored_key, stored_value


@triton.jit
def quantise_kernel(
    key: tl.tuple,
    value: tl.tuple,
    stored_key: tl.tuple,
    stored_value: tl.tuple,
    key_unit: tl.tensor,
    value_unit: tl.tensor,
    num_tokens: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Grid [token blocks, H]: some tokens of one head."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    # fmt: off
    _quantise_tile(key, stored_key, key_unit, token, num_tokens, HEAD_SIZE, BLOCK_SIZE)
    _quantise_tile(value, stored_value, value_unit, token, num_tokens, HEAD_SIZE, BLOCK_SIZE)
    # fmt: on


@triton.jit
def _quantise_tile(
    source: tl.tuple,
    target: tl.tuple,
    unit: tl.tensor,
    token: tl.tensor,
    num_tokens: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    head, channel = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_SIZE)
    mask = (token < num_tokens)[:, None] & (channel < HEAD_SIZE)[None, :]
    place = token.to(tl.int64)[:, None]
    given = source.data + place * source.stride + head * source.head_stride + channel[None, :]
    numbers = tl.load(given, mask=mask, other=0.0).to(tl.float32)
    # a product with the inverse would round otherwise
    numbers = tl.div_rn(numbers, tl.full(numbers.shape, 1.0, tl.float32) * unit)
    stored = target.data + place * target.stride + head * target.head_stride + channel[None, :]
    tl.store(stored, round_to(numbers, target.data.dtype.element_ty), mask=mask)
