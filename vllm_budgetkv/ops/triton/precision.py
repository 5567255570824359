"""In which type the matrix products of a kernel take their operands; they sum in float32."""

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
