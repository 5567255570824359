"""`attend` in Triton: which of the kernels run, decided by shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton

from vllm_budgetkv.ops.triton.arguments import Pages, Tables, Tokens, Weighing, require_dense
from vllm_budgetkv.ops.triton.attend_decode import (
    MIN_BLOCK_QUERIES,
    Runs,
    block_runs,
    decode_kernel,
    decode_options,
    join_kernel,
    run_tokens,
)
from vllm_budgetkv.ops.triton.attend_prefill import prefill_kernel, prefill_options
from vllm_budgetkv.ops.triton.precision import dot_type
from vllm_budgetkv.ops.triton.rows import count_blocks

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.ops.views import BatchRows, PagedHeads, Softmax


def attend(
    query: torch.Tensor,
    heads: PagedHeads,
    rows: BatchRows,
    out: torch.Tensor,
    scale: Softmax,
    ahead: torch.Tensor | None,
) -> None:
    """See `vllm_budgetkv.ops.attend.attend`.

    Two launches at most. With more tokens than rows, rows of one token go to the decode kernel and
    the others to the prefill kernel, which also joins the runs of the former. Else there is decode
    alone, and its join. So the result for a request does not depend on the batch, unless the batch
    has rows without tokens.
    """
    num_tokens, num_query_heads, _ = query.shape
    num_rows, num_heads, layout = rows.slots.shape[0], heads.num_heads, heads.pool.layout
    if num_rows == 0 or num_tokens == 0:
        return
    where = (rows.slots, rows.query_start)
    require_dense(slots=rows.slots, query_start=rows.query_start)
    group, is_decode = num_query_heads // num_heads, num_tokens <= num_rows
    tables, to = Tables.of(heads), Tokens.of(out)
    run = run_tokens(heads.width_pages, layout)
    num_runs = max(1, triton.cdiv(heads.capacity_tokens, run))
    runs = Runs.empty(num_rows, num_query_heads, num_runs, query)
    cut = {"RUN_TOKENS": run, "NUM_RUNS": num_runs, "GROUP": group}
    cut["HAS_SINKS"] = scale.sinks is not None
    size = {"HEAD_SIZE": layout.head_size, "BLOCK_SIZE": triton.next_power_of_2(layout.head_size)}
    common = {"PAGE_TOKENS": layout.page_tokens, "DOT": dot_type(layout.dtype), **cut, **size}
    sources = (Tokens.of(query), to, Pages.of(heads.pool), tables, *where)
    common["CAPPED"], weighing = scale.soft_cap > 0, Weighing.of(scale, runs.totals)
    decode_kernel[(num_rows, num_heads, num_runs)](
        *sources,
        runs,
        weighing,
        BLOCK_QUERIES=max(MIN_BLOCK_QUERIES, triton.next_power_of_2(group)),
        EVERY_ROW=is_decode,
        **common,
        **decode_options(layout),
    )
    block = block_runs(num_runs)
    if not is_decode:
        options = {**prefill_options(layout), "HAS_AHEAD": ahead is not None}
        # unread without, but a kernel takes no None among its tensors
        seen = rows.slots if ahead is None else ahead
        blocks = count_blocks(num_tokens, num_rows, options["BLOCK_QUERIES"] // group)
        prefill_kernel[(blocks, num_heads)](
            *sources, num_rows, runs, weighing, seen, BLOCK_RUNS=block, **common, **options
        )
    elif num_runs > 1:
        joined = (to, tables, *where, runs, weighing)
        join_kernel[(num_rows, num_query_heads)](*joined, BLOCK_RUNS=block, **cut, **size)
