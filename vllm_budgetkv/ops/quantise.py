"""`quantise`: keys and values as pages of 8-bit floats store them."""

from __future__ import annotations

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.quantise import quantise as quantise_reference
from vllm_budgetkv.ops.require import require


def quantise(
    key: torch.Tensor, value: torch.Tensor, key_unit: float, value_unit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in 8 bits: 4 of exponent, 3 of mantissa, and a sign.

    A number is divided by its unit in float32 and rounded to the nearest, of two to the even one;
    beyond the largest, 448, it becomes that. NaN stays NaN. The format is E4M3 of
    https://arxiv.org/abs/2209.05433, as torch.float8_e4m3fn.

    Args:
        key: [T, H, D] of a dtype that models compute in; tokens and heads may lie apart.
        value: as `key`.
        key_unit: what a stored key of 1 stands for, positive.
        value_unit: the same of values.

    Returns:
        Both, float8_e4m3fn [T, H, D], contiguous. Nothing is mutated.

    Raises:
        ValueError: a shape, dtype or unit does not fit.
    """
    require("key", key, key.dtype, (None, None, None))
    require("value", value, key.dtype, key.shape)
    for name, unit in (("key_unit", key_unit), ("value_unit", value_unit)):
        if not unit > 0:
            raise ValueError(f"{name} is {unit}; it must be positive")
    match backend.of(key):
        case "reference":
            return quantise_reference(key, value, key_unit, value_unit)
        case "triton":
            from vllm_budgetkv.ops.triton.quantise import quantise as quantise_triton

            return quantise_triton(key, value, key_unit, value_unit)
        case "cpp":
            extension.load()
            key, value = torch.ops.budgetkv.quantise(key, value, key_unit, value_unit)
            return key, value
