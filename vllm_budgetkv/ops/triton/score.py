"""`score` in Triton: one launch makes logits and norms, one the mass and the top k."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import Pages, Tables, Tokens, Weighing
from vllm_budgetkv.ops.triton.arrival import counters
from vllm_budgetkv.ops.triton.online_softmax import bent
from vllm_budgetkv.ops.triton.precision import dot_type
from vllm_budgetkv.ops.triton.score_finish import finish_kernel

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads, Softmax

MIN_RUN_TOKENS = 256
MAX_RUNS = 64
# rows up to this long are ranked in registers
MAX_RESIDENT_TOKENS = 8192
BLOCK_COLUMNS = 128
# a question may have any number of rows, and none of them is compiled for
MIN_BLOCK_ROWS = 64


class Logits(NamedTuple):
    """Logits [Hq, M, n] in units of log 2; peaks and totals of each run of keys [Hq, M, runs]."""

    logits: Any
    peaks: Any
    totals: Any


class Found(NamedTuple):
    """Of each token [H, n], of each query head [Hq]: see `vllm_budgetkv.ops.score.Scores`."""

    mass: torch.Tensor
    topk_mass: torch.Tensor


def score(
    probe: torch.Tensor,
    heads: PagedHeads,
    scale: Softmax,
    top_k: int,
    num_sinks: int,
    takes_largest: bool,
    max_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `vllm_budgetkv.ops.score.score`; returns the fields of `Scores` in their order."""
    num_rows, num_query_heads, _ = probe.shape
    num_heads, layout = heads.num_heads, heads.pool.layout
    # the kernel finds its head in tables of all slots: here there is one
    one = heads._replace(table=heads.table[None], lens=heads.lens[None])
    mass = probe.new_empty(num_heads, max_tokens, dtype=torch.float32)
    norms, topk_mass = torch.empty_like(mass), mass.new_empty(num_query_heads)
    positions = torch.empty_like(mass, dtype=torch.int32)
    if max_tokens == 0:
        return mass, topk_mass.fill_(1.0), norms, positions
    run = max(MIN_RUN_TOKENS, triton.next_power_of_2(triton.cdiv(max_tokens, MAX_RUNS)))
    num_runs = triton.cdiv(max_tokens, run)
    work = Logits(
        mass.new_empty(num_query_heads, num_rows, max_tokens),
        mass.new_empty(num_query_heads, num_rows, num_runs),
        mass.new_empty(num_query_heads, num_rows, num_runs),
    )
    group, same = num_query_heads // num_heads, probe.dtype == layout.dtype
    options = _options(layout.dtype if same else torch.float32, layout.head_size)
    weighing = Weighing.of(scale, mass)
    tiles = triton.cdiv(num_rows * group, options["BLOCK_QUERIES"])
    logits_kernel[(num_runs, tiles, num_heads)](
        Tokens.of(probe),
        Pages.of(heads.pool),
        Tables.of(one),
        work,
        norms,
        positions,
        num_rows,
        max_tokens,
        weighing,
        GROUP=group,
        RUN_TOKENS=run,
        PAGE_TOKENS=layout.page_tokens,
        HEAD_SIZE=layout.head_size,
        BLOCK_SIZE=triton.next_power_of_2(layout.head_size),
        CAPPED=scale.soft_cap > 0,
        **options,
    )
    found = Found(mass, topk_mass)
    _finish(work, heads.lens, positions, found, scale.sinks, (top_k, num_sinks, takes_largest))
    return mass, topk_mass, norms, positions


def _finish(
    work: Logits,
    lens: torch.Tensor,
    positions: torch.Tensor,
    found: Found,
    sinks: torch.Tensor | None,
    asked: tuple[int, int, bool],
) -> None:
    """The second launch; fills what is `found`."""
    mass, topk_mass = found
    top_k, num_sinks, takes_largest = asked
    num_query_heads, num_rows, num_runs = work.peaks.shape
    num_heads, max_tokens = mass.shape
    columns = triton.cdiv(max_tokens, BLOCK_COLUMNS)
    finish_kernel[(num_query_heads * num_rows + num_heads * columns,)](
        work,
        lens,
        positions,
        mass,
        topk_mass,
        mass if sinks is None else sinks,
        mass.new_empty(num_query_heads, num_rows),
        counters(num_query_heads, mass.device),
        *(num_rows, max_tokens, num_runs, top_k, num_sinks),
        NUM_QUERY_HEADS=num_query_heads,
        GROUP=num_query_heads // num_heads,
        BLOCK_RUNS=triton.next_power_of_2(num_runs),
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        BLOCK_ROWS=max(MIN_BLOCK_ROWS, triton.next_power_of_2(num_rows)),
        BLOCK_KEYS=min(triton.next_power_of_2(max_tokens), MAX_RESIDENT_TOKENS),
        TAKES_LARGEST=takes_largest,
        HAS_SINKS=sinks is not None,
        IS_RESIDENT=max_tokens <= MAX_RESIDENT_TOKENS,
    )


def _options(dtype: torch.dtype, head_size: int) -> dict[str, Any]:
    """Tile sizes, so that a tile of keys stays below 16 KiB, and the products' operands."""
    is_wide = head_size * dtype.itemsize > 256
    if dtype == torch.float32:
        queries, keys = (16, 32) if is_wide else (32, 32)
    else:
        queries, keys = (64, 32) if is_wide else (64, 64)
    return {
        "BLOCK_QUERIES": queries,
        "BLOCK_KEYS": keys,
        "DOT": dot_type(dtype),
        "num_warps": 4,
        "num_stages": 2,
    }


@triton.jit(do_not_specialize=["num_rows"])
def logits_kernel(
    probe: tl.tuple,
    pages: tl.tuple,
    tables: tl.tuple,
    work: tl.tuple,
    norms: tl.tensor,
    positions: tl.tensor,
    num_rows: tl.tensor,
    max_tokens: tl.tensor,
    weighing: tl.tuple,
    GROUP: tl.constexpr,
    RUN_TOKENS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT: tl.constexpr,
    CAPPED: tl.constexpr,
) -> None:
    """Grid [runs, query tiles, H]: logits of a tile of probe rows and query heads to a run of keys.

    Queries of a KV head are numbered g * M + m. The first tile also writes norms and positions.
    """
    run, tile, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_keys = tl.minimum(tl.load(tables.lens + head), max_tokens)
    entries = tables.table + head * tables.head_stride
    query, channel = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES), tl.arange(0, BLOCK_SIZE)
    is_query, is_channel = query < num_rows * GROUP, channel < HEAD_SIZE
    vectors = (query % num_rows).to(tl.int64) * probe.stride
    vectors += (head * GROUP + query // num_rows) * probe.head_stride
    mask = is_query[:, None] & is_channel[None, :]
    queries = tl.load(probe.data + vectors[:, None] + channel[None, :], mask=mask, other=0.0)
    row = (head * GROUP * num_rows + query).to(tl.int64)
    peak = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    first, stop = run * RUN_TOKENS, tl.minimum((run + 1) * RUN_TOKENS, max_tokens)
    for block in range(first, stop if tile == 0 else tl.minimum(stop, num_keys), BLOCK_KEYS):
        index = block + tl.arange(0, BLOCK_KEYS)
        held = index < num_keys
        page = tl.load(entries + index // PAGE_TOKENS, mask=held, other=0).to(tl.int64)
        token = page * pages.stride + index % PAGE_TOKENS * HEAD_SIZE
        where = token[:, None] + channel[None, :]
        is_held = held[:, None] & is_channel[None, :]
        keys = tl.load(pages.key + where, mask=is_held, other=0.0)
        products = tl.dot(queries.to(DOT), tl.trans(keys.to(DOT)), input_precision="ieee")
        scores = bent(products * weighing.scale, weighing.cap, CAPPED)
        scores = tl.where(held[None, :], scores, float("-inf"))
        target = work.logits + row[:, None] * max_tokens + index[None, :]
        tl.store(target, scores, mask=is_query[:, None] & held[None, :])
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        peak = new_peak
        if tile == 0:
            values = tl.load(pages.value + where, mask=is_held, other=0.0).to(tl.float32)
            column = head.to(tl.int64) * max_tokens + index
            tl.store(
                norms + column,
                tl.sqrt_rn(tl.sum(values * values, 1)) * weighing.value_unit,
                mask=index < stop,
            )
            word = page * pages.word_stride + index % PAGE_TOKENS
            position = tl.load(pages.position + word, mask=held, other=-1)
            tl.store(positions + column, position, mask=index < stop)
    at = row * tl.num_programs(0) + run
    tl.store(work.peaks + at, peak, mask=is_query)
    tl.store(work.totals + at, total, mask=is_query)
