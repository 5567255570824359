"""How a batch of ragged rows is cut into blocks without knowing the rows on the host."""

from __future__ import annotations

import triton
import triton.language as tl


def count_blocks(num_tokens: int, num_rows: int, block_tokens: int) -> int:
    """Enough blocks of `block_tokens` tokens for any cut of the tokens into rows."""
    return num_tokens // block_tokens + num_rows


@triton.jit
def first_block(query_start: tl.tensor, row: tl.tensor, BLOCK_TOKENS: tl.constexpr) -> tl.tensor:
    """First block of a row: no row needs more blocks than lie between two of these."""
    return tl.load(query_start + row) // BLOCK_TOKENS + row


@triton.jit
def find_row(
    query_start: tl.tensor, num_rows: tl.tensor, block: tl.tensor, BLOCK_TOKENS: tl.constexpr
) -> tl.tensor:
    """The row of a block; -1 for a block in front of the first row."""
    row = -1
    for first in range(0, num_rows, 128):
        rows = first + tl.arange(0, 128)
        starts = tl.load(query_start + rows, mask=rows < num_rows, other=0)
        begun = (starts // BLOCK_TOKENS + rows <= block) & (rows < num_rows)
        row += tl.sum(begun.to(tl.int32))
    return row
