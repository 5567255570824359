"""Cases of the ops of recall: a decode step, and what a prompt costs that recalls.

All layers of one request whose budget is a tenth of its prompt, a third of its heads recalling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.kernels import work
from benchmarks.kernels.caches import build_cache, equal_lens
from benchmarks.kernels.remembered import EMPTY, Remembered, build_tier, remember
from benchmarks.kernels.rows import Bench, Row, measure_row
from benchmarks.kernels.shapes import CHUNK_TOKENS, QWEN25_VL_7B, ModelShape
from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.arithmetic.recall import Recall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.kernels.work import Work

PROMPT_TOKENS = (32768, 131072)
BUDGET_SHARE = 0.1
# as the options have them
HEADS_SHARE, SLOTS_SHARE, MAX_INDEX_SHARE = 1 / 3, 0.5, 0.5
# of what a step recalls: nothing of it stands there already, or most of it does
NEW_SHARES = (1.0, 0.3)
HOST_COPY_BYTES = 256 << 20
# a prompt over what its heads hold, where only the host's time counts
PROMPT_TIMES = 10


@dataclass(frozen=True)
class RecallStep:
    """All layers of one request behind its prompt.

    Attributes:
        model: of the heads.
        prompt_tokens: of the request.
        layers: each with a cache of its own, over one host memory.
        queries: of every layer, [1, Hq, D].
        rows: the request's token.
        moved: of every layer, int32 [1, H].
    """

    model: ModelShape
    prompt_tokens: int
    layers: list[Remembered]
    queries: list[torch.Tensor]
    rows: ops.BatchRows
    moved: list[torch.Tensor]

    @property
    def num_heads(self) -> int:
        """Heads that recall."""
        return sum(int((layer.recalls.num_tokens > 0).sum()) for layer in self.layers)

    @property
    def indexed_tokens(self) -> int:
        return self.num_heads * self.prompt_tokens

    @property
    def recalled_tokens(self) -> int:
        return sum(int(layer.recalls.num_recalled.sum()) for layer in self.layers)

    @property
    def held_tokens(self) -> int:
        """Tokens that heads which recall hold behind their recall pages."""
        total = 0
        for layer in self.layers:
            held = layer.cache.lens - layer.recalls.num_recalled
            total += int(held[layer.recalls.num_tokens > 0].sum())
        return total

    def encode(self) -> None:
        for layer in self.layers:
            ops.encode(0, layer.tier, layer.recalls, layer.cache.pool, layer.energy)

    def mark(self) -> None:
        for layer in self.layers:
            ops.mark(0, layer.cache.heads, layer.recalls)

    def recall(self) -> None:
        scale = self.model.head_size**-0.5
        for layer, query, moved in zip(self.layers, self.queries, self.moved, strict=True):
            heads = layer.cache.heads
            ops.recall(query, heads, self.rows, layer.recalls, layer.tier, scale, moved)

    def count_moved(self, reset: Callable[[], None]) -> int:
        """Tokens that a step fetches."""
        reset()
        before = sum(int(moved.sum()) for moved in self.moved)
        self.recall()
        return sum(int(moved.sum()) for moved in self.moved) - before

    def forget(self, share: float) -> Callable[[], None]:
        """A call that empties a share of the places that the last step filled, always the same."""
        places = []
        for layer in self.layers:
            pages, positions = layer.all_recall_pages(), layer.cache.pool.positions
            filled = positions[pages]
            order = torch.randperm(filled.numel(), device=filled.device).view_as(filled)
            is_gone = order < round(share * filled.numel())
            places.append((positions, pages, filled.masked_fill(is_gone, EMPTY)))

        def reset() -> None:
            for positions, pages, remembered in places:
                positions[pages] = remembered

        return reset


def make_step(bench: Bench, model: ModelShape, prompt_tokens: int) -> RecallStep:
    """What `Recaller.open` finds; the heads that recall are spread over the layers."""
    layout, all_heads = bench.layout(model), model.layers * model.kv_heads
    num_heads = max(1, round(HEADS_SHARE * all_heads))
    plan = Recall(
        num_heads=num_heads,
        all_heads=all_heads,
        page_words=layout.page_words,
        code_words=layout.code_words,
        slots_share=SLOTS_SHARE,
        max_index_share=MAX_INDEX_SHARE,
    )
    room = plan.room(prompt_tokens, int(BUDGET_SHARE * prompt_tokens), bench.page_tokens)
    assert room is not None
    recalling = torch.zeros(all_heads, dtype=torch.bool)
    recalling[torch.arange(num_heads) * all_heads // num_heads] = True
    num_tokens, held = (prompt_tokens,), equal_lens(1, model.kv_heads, room.resident_tokens)
    tiers = build_tier(num_tokens, model.layers, model.kv_heads, layout, bench.device)
    layers = [
        remember(tier, num_tokens, held, flags[None], room.slot_pages, layout)
        for tier, flags in zip(tiers, recalling.view(model.layers, -1), strict=True)
    ]
    queries = [bench.randn(1, model.heads, model.head_size) for _ in layers]
    moved = [torch.zeros_like(layer.cache.lens) for layer in layers]
    return RecallStep(model, prompt_tokens, layers, queries, bench.rows(1), moved)


def recall(bench: Bench) -> Iterator[Row]:
    """Index and marks of a prompt, decode steps with no hits and with most, and a chunk.

    Rates are of bytes through device memory; figures are of the link to host memory.
    """
    model, link = QWEN25_VL_7B, _measure_link(bench)
    for prompt_tokens in PROMPT_TOKENS[: 1 if bench.quick else None]:
        step = make_step(bench, model, prompt_tokens)
        case = f"{model.name}, {model.layers} layers, {step.num_heads} heads, {prompt_tokens:,}"
        encoded = work.encode(model, step.num_heads, step.indexed_tokens, bench.page_tokens)
        row = measure_row(bench, "encode", f"{case} tokens", step.encode, encoded)
        yield _against_link(row, encoded, link)
        marked = work.mark(step.indexed_tokens, step.held_tokens)
        yield measure_row(bench, "mark", f"{case} tokens", step.mark, marked)
        # what follows empties places that a step has filled
        step.recall()
        for share in NEW_SHARES:
            yield _recall_row(bench, step, f"{case} tokens, {share:.0%} new", share, link)
    yield from _chunk_rows(bench, model, link)


def _recall_row(bench: Bench, step: RecallStep, case: str, share: float, link: float) -> Row:
    reset = step.forget(share)
    moved = step.count_moved(reset)
    sizes = (step.num_heads, step.indexed_tokens, step.recalled_tokens, moved)
    counted = work.recall(step.model, *sizes, bench.page_tokens)
    row = _against_link(
        measure_row(bench, "recall", case, step.recall, counted, reset), counted, link
    )
    figures = {"tokens": step.prompt_tokens, "recalled": step.recalled_tokens, "moved": moved}
    return replace(row, figures=row.figures | figures)


def _chunk_rows(bench: Bench, model: ModelShape, link: float) -> Iterator[Row]:
    """A chunk of one layer, to host memory and from there, as tokens and as pages."""
    layout = bench.layout(model)
    tier = build_tier((CHUNK_TOKENS,), 1, model.kv_heads, layout, bench.device)[0]
    shape = (CHUNK_TOKENS, model.kv_heads, model.head_size)
    key, value = (bench.randn(*shape) for _ in range(2))
    rows, counted = bench.rows(1, CHUNK_TOKENS), work.store(model, CHUNK_TOKENS)
    case = f"{model.name}, {CHUNK_TOKENS:,} tokens"
    for name, op in (("store", ops.store), ("load", ops.load)):
        row = measure_row(bench, name, case, partial(op, key, value, rows, tier), counted)
        yield _against_link(row, counted, link)
    cache = build_cache(equal_lens(1, model.kv_heads, CHUNK_TOKENS), layout, bench.device)
    pages = cache.table[0, :, : ceil_div(CHUNK_TOKENS, bench.page_tokens)]
    staged = partial(ops.stage, pages, cache.pool, 0, 0, tier)
    row = measure_row(bench, "stage", case, staged, counted)
    yield _against_link(row, counted, link)


def _measure_link(bench: Bench) -> float:
    """Bytes per second of a copy from host memory, pinned for a GPU, to the device."""
    on_gpu = bench.device.type == "cuda"
    source = torch.empty(HOST_COPY_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.empty_like(source, device=bench.device)
    timing = bench.clock.measure(lambda: target.copy_(source, non_blocking=True))
    return HOST_COPY_BYTES / timing.seconds


def _against_link(row: Row, counted: Work, link: float) -> Row:
    """With the rate over the link to host memory, and its share of a copy's."""
    rate = counted.host_bytes / row.seconds
    return replace(row, figures={"host_bytes_per_second": rate, "of_host_copy": rate / link})


def host_calls(
    bench: Bench, model: ModelShape, num_rows: int, held_tokens: int
) -> dict[str, Callable[[], object]]:
    """A call of every op for one layer, all of whose heads recall a page."""
    layout, shape = bench.layout(model), (num_rows, model.kv_heads)
    num_tokens = (PROMPT_TIMES * held_tokens,) * num_rows
    tier = build_tier(num_tokens, 1, model.kv_heads, layout, bench.device)[0]
    held, recalling = equal_lens(*shape, held_tokens), torch.ones(shape, dtype=torch.bool)
    layer = remember(tier, num_tokens, held, recalling, 1, layout)
    heads, recalls, rows = layer.cache.heads, layer.recalls, bench.rows(num_rows)
    query, moved = bench.randn(num_rows, model.heads, model.head_size), heads.lens * 0
    new = bench.randn(num_rows, model.kv_heads, model.head_size)
    return {
        "store": lambda: ops.store(new, new, rows, tier),
        "load": lambda: ops.load(new, new, rows, tier),
        "encode": lambda: ops.encode(0, tier, recalls, heads.pool, layer.energy),
        "mark": lambda: ops.mark(0, heads, recalls),
        "recall": lambda: ops.recall(query, heads, rows, recalls, tier, 0.1, moved),
    }
