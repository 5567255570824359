"""Cases of `attend` and `retrieve`: decode, ragged heads, budgets, chunks and retrieval."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from benchmarks.kernels import work
from benchmarks.kernels.caches import build_cache, equal_lens, ragged_lens
from benchmarks.kernels.peers import HEADWISE, WHOLE_REQUEST, Batch
from benchmarks.kernels.rows import Bench, Row, measure_row, time_peers
from benchmarks.kernels.shapes import (
    CHUNK_TOKENS,
    MODELS,
    QWEN25_VL_7B,
    RETRIEVAL_RATIO,
    ModelShape,
)
from vllm_budgetkv import ops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.kernels.work import Work

LONG_TOKENS = 30_000
DECODE_TOKENS = (4096, 16384, LONG_TOKENS, 65536, 131072)
DECODE_ROWS = (1, 4, 16, 64)
OTHER_DECODES = ((4096, 64), (LONG_TOKENS, 16), (131072, 4))
QUICK_DECODES = ((4096, 64), (LONG_TOKENS, 1), (LONG_TOKENS, 16))
# keys and values of a case; its peers hold two more copies
MAX_CASE_BYTES = 6 << 30
RAGGED_DECODES = ((16, 3000), (64, 3000), (16, LONG_TOKENS))
BUDGETS = (0.05, 0.1, 0.2)
BUDGET_ROWS = 16
RETRIEVALS = ((16, LONG_TOKENS), (64, 3000), (1, LONG_TOKENS), (4, 131072))
CHOICE = ops.PageChoice(RETRIEVAL_RATIO, sink_pages=1, window_pages=2)


@dataclass(frozen=True)
class Attention:
    """Queries over a cache, and the call that attends to it.

    Every slot is a row; its last `row_tokens` tokens ask.
    """

    model: ModelShape
    batch: Batch
    out: torch.Tensor
    run: Callable[[], None]

    @property
    def work(self) -> Work:
        cache, tokens = self.batch.cache, self.batch.row_tokens
        sizes = (cache.head_tokens, cache.pool.layout.page_tokens)
        if tokens == 1:
            return work.attend(self.model, self.batch.rows, *sizes)
        one = work.attend_chunk(self.model, tokens, sizes[0] / self.batch.rows, sizes[1])
        return one * self.batch.rows


def attention(bench: Bench, model: ModelShape, lens: torch.Tensor, tokens: int = 1) -> Attention:
    """`attend` for `tokens` queries of every row, over a new cache with these lengths."""
    cache = build_cache(lens, bench.layout(model), bench.device)
    rows = bench.rows(len(lens), tokens)
    query = bench.randn(len(lens) * tokens, model.heads, model.head_size)
    batch, out = Batch(query, cache, tokens), torch.full_like(query, torch.nan)

    def run() -> None:
        ops.attend(query, cache.heads, rows, out, batch.scale)

    return Attention(model, batch, out, run)


def against_peers(bench: Bench, section: str, case: str, ours: Attention, ragged: bool) -> Row:
    """Our time, then the peers' on the same tokens."""
    row = measure_row(bench, section, case, ours.run, ours.work)
    peers = HEADWISE if ragged else WHOLE_REQUEST
    if not ragged and ours.batch.row_tokens > 1:
        peers = WHOLE_REQUEST | HEADWISE
    seconds, refused = time_peers(bench, ours.batch, peers, ours.out)
    return replace(row, peers=seconds, refused=refused)


def decode_cases(quick: bool) -> Iterator[tuple[ModelShape, int, int]]:
    """(model, rows, tokens): the grid for a 7B, three points for every other model."""
    if quick:
        yield from ((QWEN25_VL_7B, rows, tokens) for tokens, rows in QUICK_DECODES)
        return
    for tokens in DECODE_TOKENS:
        for rows in DECODE_ROWS:
            kv_bytes = rows * tokens * QWEN25_VL_7B.kv_heads * 2 * work.vector_bytes(QWEN25_VL_7B)
            if kv_bytes <= MAX_CASE_BYTES:
                yield QWEN25_VL_7B, rows, tokens
    for model in MODELS:
        if model is not QWEN25_VL_7B:
            yield from ((model, rows, tokens) for tokens, rows in OTHER_DECODES)


def decode(bench: Bench) -> Iterator[Row]:
    """One token per row, heads of one length."""
    for model, rows, tokens in decode_cases(bench.quick):
        ours = attention(bench, model, equal_lens(rows, model.kv_heads, tokens))
        case = f"{model.name}, {rows} x {tokens:,} tokens"
        yield against_peers(bench, "decode", case, ours, ragged=False)


def ragged_decode(bench: Bench) -> Iterator[Row]:
    """One token per row; heads hold a quarter to seven quarters of the mean."""
    model = QWEN25_VL_7B
    for rows, tokens in RAGGED_DECODES[: 1 if bench.quick else None]:
        even = attention(bench, model, equal_lens(rows, model.kv_heads, tokens))
        even_seconds = bench.clock.measure(even.run).seconds
        ours = attention(bench, model, ragged_lens(rows, model.kv_heads, tokens))
        case = f"{model.name}, {rows} x {tokens:,} tokens on average"
        row = against_peers(bench, "ragged decode", case, ours, ragged=True)
        yield replace(row, figures={"over_equal_lengths": row.seconds / even_seconds})


def budget(bench: Bench) -> Iterator[Row]:
    """Decode over a share of 30,000 tokens, ragged, against FlashAttention over all of them."""
    model = QWEN25_VL_7B
    for rows in (BUDGET_ROWS,) if bench.quick else (1, BUDGET_ROWS, 64):
        full = attention(bench, model, equal_lens(rows, model.kv_heads, LONG_TOKENS))
        case = f"{model.name}, {rows} x all of {LONG_TOKENS:,} tokens"
        whole = against_peers(bench, "budget", case, full, ragged=False)
        yield whole
        for share in (0.1,) if bench.quick else BUDGETS:
            tokens = round(share * LONG_TOKENS)
            ours = attention(bench, model, ragged_lens(rows, model.kv_heads, tokens))
            case = f"{model.name}, {rows} x {share:.0%} of {LONG_TOKENS:,} tokens"
            row = measure_row(bench, "budget", case, ours.run, ours.work)
            figures = {"rows": rows, "budget": share, "full_ours_seconds": whole.seconds}
            if whole.best_flash_seconds is not None:
                figures["full_flash_over_ours"] = whole.best_flash_seconds / row.seconds
            yield replace(row, figures=figures)


def prefill(bench: Bench) -> Iterator[Row]:
    """A chunk behind a compressed cache: our kernel, and FlashAttention by head over its pages."""
    cases = [(model, 1, 3000) for model in MODELS]
    cases += [(QWEN25_VL_7B, 4, 3000), (QWEN25_VL_7B, 1, LONG_TOKENS)]
    for model, rows, held in [(QWEN25_VL_7B, 1, 3000)] if bench.quick else cases:
        for ragged in (False, True):
            shape = ragged_lens if ragged else equal_lens
            lens = shape(rows, model.kv_heads, held) + CHUNK_TOKENS
            ours = attention(bench, model, lens, CHUNK_TOKENS)
            kind = "ragged" if ragged else "equal"
            case = f"{model.name}, {rows} x {CHUNK_TOKENS:,} behind {held:,} tokens, {kind}"
            row = against_peers(bench, "prefill", case, ours, ragged)
            by_head = [took for name, took in row.peers.items() if name.startswith("flash by head")]
            figures = {"flash_by_head_over_ours": min(by_head) / row.seconds} if by_head else {}
            yield replace(row, figures=figures)


@dataclass(frozen=True)
class Retrieval:
    """`retrieve` for the rows of an attention, and `attend` to what it chose."""

    choose: Callable[[], None]
    run: Callable[[], None]


def retrieval(bench: Bench, dense: Attention) -> Retrieval:
    """Every head retrieves."""
    batch, cache = dense.batch, dense.batch.cache
    rows, chosen = bench.rows(batch.rows), cache.room_to_choose()
    dynamic = torch.ones_like(cache.lens, dtype=torch.bool)

    def choose() -> None:
        ops.retrieve(batch.query, cache.heads, rows, dynamic, CHOICE, chosen)

    def run() -> None:
        choose()
        ops.attend(batch.query, chosen, rows, dense.out, batch.scale)

    return Retrieval(choose, run)


def retrieved_decode(bench: Bench) -> Iterator[Row]:
    """Choose 40 % of the pages and attend to them, against attending to all."""
    model = QWEN25_VL_7B
    for rows, tokens in RETRIEVALS[: 1 if bench.quick else None]:
        dense = attention(bench, model, equal_lens(rows, model.kv_heads, tokens))
        both = retrieval(bench, dense)
        dense_seconds = bench.clock.measure(dense.run).seconds
        case = f"{model.name}, {rows} x {RETRIEVAL_RATIO:.0%} of {tokens:,} tokens"
        chosen_work = work.retrieve(model, dense.batch.cache.head_pages)
        read = RETRIEVAL_RATIO * dense.batch.cache.head_tokens
        read_work = work.attend(model, rows, read, bench.page_tokens)
        row = measure_row(bench, "retrieval", case, both.run, chosen_work + read_work)
        figures = {"rows": rows, "tokens": tokens, "dense_over_ours": dense_seconds / row.seconds}
        yield replace(row, figures=figures)
        yield measure_row(bench, "retrieval", f"{case}: retrieve", both.choose, chosen_work)
