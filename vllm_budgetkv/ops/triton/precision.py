"""Types of numbers: of the operands of matrix products, which sum in float32, and of pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_DOT_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The operands' type for tensors of this dtype.

    Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers, so there
    it is float32, which holds every product of two of them exactly.
    """
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return _DOT_TYPES[dtype]


@triton.jit
def round_to(numbers: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """float32 `numbers` in a type of pages, rounded to the nearest, of two to the even one."""
    if TYPE == tl.float8e4nv:  # noqa: SIM300
        numbers = _quantise(numbers)
    else:
        numbers = numbers.to(TYPE)
    return numbers


@triton.jit
def _quantise(numbers: tl.tensor) -> tl.tensor:
    """float8e4nv of float32 `numbers`, 448 at most in size; NaN stays NaN.

    By hand, because Triton's interpreter rounds halves up, lets a mantissa that overflows spoil the
    exponent, and knows no NaN of this type. So what its tests see is what a GPU runs, and a GPU's
    conversions that saturate and those that do not agree.
    """
    bits = numbers.to(tl.int32, bitcast=True)
    size, sign = bits & 0x7FFFFFFF, (bits >> 24) & 0x80
    is_number = size <= 0x7F800000
    # that of 448
    size = tl.minimum(size, 0x43E00000)
    # 3 of 23 bits of mantissa stay, and the bias of the exponent, of 127, becomes 7
    normal = (size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)) >> 20
    # below 2**-6 all codes are 2**-9 apart, as float32 numbers behind 2**14 are
    shifted = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
    code = tl.where(size < 0x3C800000, shifted - 0x46800000, normal)
    code = tl.where(is_number, code, 0x7F) | sign
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
