"""Cases of the ops that compress: each alone, and one chunk's step over all layers of a 7B."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from benchmarks.kernels import work
from benchmarks.kernels.caches import Cache, build_cache, equal_lens, ragged_lens
from benchmarks.kernels.rows import Bench, Row, measure_row
from benchmarks.kernels.shapes import (
    CHUNK_TOKENS,
    PROBE_TOKENS,
    QWEN3_VL_8B,
    QWEN25_VL_3B,
    QWEN25_VL_7B,
    QWEN25_VL_72B,
    ModelShape,
)
from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.layout import MIN_HEAD_SIZE, PageLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUDGET_TOKENS = 3000
HELD_TOKENS = BUDGET_TOKENS + CHUNK_TOKENS
TOP_K_SHARE, SINK_TOKENS = 0.1, 4
DECODE_ROWS = 64
MERGE_THRESHOLD = 0.8


@dataclass(frozen=True)
class Layers:
    """Layers of one request, each a slot of the cache with a free stack of its own."""

    model: ModelShape
    cache: Cache
    probe: torch.Tensor
    tiers: torch.Tensor
    budgets: torch.Tensor

    @property
    def longest_tokens(self) -> int:
        return self.tiers.shape[1]

    def score(self, layer: int, takes_largest: bool = False) -> ops.Scores:
        numbers = (self.probe.shape[2] ** -0.5, round(TOP_K_SHARE * HELD_TOKENS), SINK_TOKENS)
        heads = self.cache.heads_of(layer)
        return ops.score(self.probe, heads, *numbers, takes_largest, self.longest_tokens)

    def contrast(self, layer: int) -> torch.Tensor:
        return ops.contrast(self.cache.heads_of(layer), self.longest_tokens)

    def select(self, layer: int, scores: torch.Tensor) -> torch.Tensor:
        return ops.select(scores, self.tiers, self.cache.lens[layer], self.budgets[layer])

    def compact(self, layer: int, keep: torch.Tensor) -> None:
        ops.compact(keep, self.cache.heads_of(layer), self.cache.stack_of(layer), poison=False)

    def compress(self) -> None:
        """Score, contrast, select and compact every layer in turn, as between layers of a forward.

        What the policy computes in torch between them is left out.
        """
        for layer in range(len(self.cache.lens)):
            mass = self.score(layer).mass
            self.contrast(layer)
            self.compact(layer, self.select(layer, mass))


def make_layers(bench: Bench, model: ModelShape, count: int) -> Layers:
    """Ragged heads that hold a budget of 3,000 tokens and a chunk, on average."""
    lens = ragged_lens(count, model.kv_heads, HELD_TOKENS)
    cache = build_cache(lens, bench.layout(model), bench.device)
    probe = bench.randn(PROBE_TOKENS, model.heads, model.head_size)
    shape = (model.kv_heads, int(lens.max()))
    tiers = torch.zeros(shape, dtype=torch.uint8, device=bench.device)
    budgets = cache.lens * BUDGET_TOKENS // HELD_TOKENS
    return Layers(model, cache, probe, tiers, budgets)


def single_ops(bench: Bench) -> Iterator[Row]:
    """Every op on one layer of one request, and `append` on a batch."""
    yield from appends(bench)
    yield reserves(bench)
    models = (QWEN25_VL_7B, QWEN25_VL_3B, QWEN25_VL_72B, QWEN3_VL_8B)
    for model in models[: 1 if bench.quick else len(models)]:
        yield from _ops_of(bench, model)


def _ops_of(bench: Bench, model: ModelShape) -> Iterator[Row]:
    layers = make_layers(bench, model, 1)
    cache, saved = layers.cache, layers.cache.snapshot()
    scores = layers.score(0).mass
    keep = layers.select(0, scores)
    held, kept = cache.head_tokens, int(layers.budgets.sum())
    one = cache.heads_of(0)
    case = f"{model.name}, {HELD_TOKENS:,} tokens"

    scored = work.score(model, held, PROBE_TOKENS)
    row = measure_row(bench, "score", case, lambda: layers.score(0), scored)
    scratch = work.logits_bytes(model, held, PROBE_TOKENS)
    yield replace(row, figures={"scratch_bytes": scratch})
    yield measure_row(
        bench, "score", f"{case}, largest", lambda: layers.score(0, takes_largest=True), scored
    )
    contrasted = work.contrast(model, held)
    yield measure_row(bench, "contrast", case, lambda: layers.contrast(0), contrasted)
    selected = work.select(held)
    yield measure_row(bench, "select", case, lambda: layers.select(0, scores), selected)
    moved = work.compact(model, held, _moved_tokens(keep, cache.lens[0]))
    calls = (lambda: layers.compact(0, keep), moved, lambda: cache.restore(saved))
    yield measure_row(bench, "compact", case, *calls)
    cache.restore(saved)
    digested = work.digest(model, held, bench.page_tokens)
    yield measure_row(bench, "digest", case, lambda: ops.digest(one), digested)
    merged = work.merge(model, kept, held - kept, model.kv_heads)
    numbers = ("value", held, MERGE_THRESHOLD)
    yield measure_row(bench, "merge", case, lambda: ops.merge(keep, one, keep, *numbers), merged)


def _moved_tokens(keep: torch.Tensor, lens: torch.Tensor) -> int:
    """Survivors behind the first token that goes."""
    held = torch.arange(keep.shape[1], device=keep.device) < lens[:, None]
    gone_before = (held & ~keep).cumsum(dim=1) > 0
    return int((held & keep & gone_before).sum())


def appends(bench: Bench) -> Iterator[Row]:
    """A chunk of one request, and one token of each of 64."""
    model = QWEN25_VL_7B
    for rows, tokens in ((1, CHUNK_TOKENS), (DECODE_ROWS, 1)):
        lens = equal_lens(rows, model.kv_heads, BUDGET_TOKENS)
        cache = build_cache(lens, bench.layout(model), bench.device, growth_tokens=tokens)
        run, saved = append_call(bench, model, cache, tokens), cache.snapshot()

        def reset(cache: Cache = cache, saved: Cache = saved) -> None:
            cache.restore(saved)

        case = f"{model.name}, {rows} x {tokens:,} tokens"
        counted = work.append(model, rows * tokens)
        yield measure_row(bench, "append", case, run, counted, reset)


def reserves(bench: Bench) -> Row:
    """Pages of the next token for all layers of 64 requests, every head at the end of its page."""
    model, page_tokens = QWEN25_VL_7B, bench.page_tokens
    heads = model.layers * model.kv_heads
    lens = equal_lens(DECODE_ROWS, heads, BUDGET_TOKENS // page_tokens * page_tokens)
    # pages are not read, so small ones do
    layout = PageLayout(page_tokens, MIN_HEAD_SIZE, torch.bfloat16)
    cache = build_cache(lens, layout, bench.device, growth_tokens=1)
    saved, rows = cache.snapshot(), bench.rows(DECODE_ROWS)
    rows.shared.fill_(True)

    def run() -> None:
        ops.reserve(cache.heads, cache.stack, rows)

    case = f"{model.name}, {model.layers} layers, {DECODE_ROWS} rows"
    counted = work.reserve(DECODE_ROWS * heads)
    return measure_row(bench, "reserve", case, run, counted, lambda: cache.restore(saved))


def append_call(
    bench: Bench, model: ModelShape, cache: Cache, row_tokens: int
) -> Callable[[], None]:
    """`append` of `row_tokens` tokens to every slot, with pages of its free stack."""
    count = len(cache.lens) * row_tokens
    key, value = (bench.randn(count, model.kv_heads, model.head_size) for _ in range(2))
    rows = bench.rows(len(cache.lens), row_tokens)
    rows.first_position.copy_(cache.lens[:, 0])
    rows.shared.fill_(True)

    def run() -> None:
        ops.append(key, value, cache.heads, cache.stack, rows)

    return run


def compress_step(bench: Bench) -> Iterator[Row]:
    """All layers of a chunk, as a share of the chunk's forward by the measured matmul rate."""
    model = QWEN25_VL_7B
    layers = make_layers(bench, model, model.layers)
    saved, held = layers.cache.snapshot(), layers.cache.head_tokens
    kept = int(layers.budgets.sum())
    counted = work.score(model, held, PROBE_TOKENS) + work.select(held)
    counted += work.contrast(model, held) + work.compact(model, held, kept)
    case = f"{model.name}, {model.layers} layers, {HELD_TOKENS:,} tokens"
    row = measure_row(
        bench, "compress step", case, layers.compress, counted, lambda: layers.cache.restore(saved)
    )
    flops = model.forward_flops(CHUNK_TOKENS, BUDGET_TOKENS + CHUNK_TOKENS / 2)
    forward_seconds = flops / bench.ceilings.matmul_flops_per_second
    figures = {"forward_seconds": forward_seconds, "of_forward": row.seconds / forward_seconds}
    yield replace(row, figures=figures)
