"""`retrieve`: the reference against a naive choice of pages, the kernels against both."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from tests.ops.factories import Cache, batch_rows, make_cache, strided_randn
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops import PageChoice, PagedHeads
from vllm_budgetkv.ops.digest import digest
from vllm_budgetkv.ops.reference.retrieve import retrieve as retrieve_reference
from vllm_budgetkv.ops.retrieve import retrieve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENS = ((1000, 0, 17, 161), (1, 15, 16, 333))


def digested_cache(
    lens: Sequence[Sequence[int]], layout: PageLayout, window_pages: int = 1
) -> Cache:
    """Digests on all pages but each head's window, where NaN must not be read."""
    cache = make_cache(lens, layout)
    for slot in range(len(lens)):
        digest(cache.heads_of(slot))
        for row, count in zip(cache.table[slot], lens[slot], strict=True):
            num_pages = -(-count // layout.page_tokens)
            window = row[max(0, num_pages - window_pages) : num_pages]
            cache.pool.digests[window.long()] = torch.nan
    return cache


def run(
    op: Callable[..., None],
    cache: Cache,
    query: torch.Tensor,
    slots: Sequence[int],
    dynamic: torch.Tensor,
    numbers: tuple[float, int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    out_table = torch.full((len(slots), *cache.table.shape[1:]), 2**30, dtype=torch.int32)
    out_lens = torch.full((len(slots), cache.lens.shape[1]), -7, dtype=torch.int32)
    rows, out = batch_rows(slots, [1] * len(slots)), PagedHeads(cache.pool, out_table, out_lens)
    op(query, cache.heads, rows, dynamic, PageChoice(*numbers), out)
    return out_table, out_lens


def page_score(query: torch.Tensor, box: torch.Tensor) -> float:
    """The formula of the docstring in float64, for one page and the queries [G, D] of a group."""
    centre, radius = box.double()
    low, high = query.double() * (centre - radius), query.double() * (centre + radius)
    return float(torch.maximum(low, high).sum(dim=1).amax())


def check_head(
    cache: Cache,
    slot: int,
    head: int,
    query: torch.Tensor,
    numbers: tuple[float, int, int],
    out_pages: list[int],
) -> None:
    """The forced pages are there, and the others score as much as the best choice would."""
    ratio, sinks, window = numbers
    num_pages = -(-int(cache.lens[slot, head]) // cache.pool.layout.page_tokens)
    pages = cache.table[slot, head, :num_pages].tolist()
    kept = max(math.ceil(ratio * num_pages), min(num_pages, sinks + window))
    chosen = [pages.index(page) for page in out_pages]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == kept
    forced = {j for j in range(num_pages) if j < sinks or j >= num_pages - window}
    assert forced <= set(chosen)
    scores = {
        j: page_score(query, cache.pool.digests[pages[j]])
        for j in range(num_pages)
        if j not in forced
    }
    best = sum(sorted(scores.values(), reverse=True)[: kept - len(forced)])
    got = sum(scores[j] for j in chosen if j not in forced)
    assert got == pytest.approx(best, rel=1e-5, abs=1e-4)


def check_retrieve(
    layout: PageLayout, group: int, numbers: tuple[float, int, int], slots: Sequence[int] = (1, 0)
) -> None:
    cache = digested_cache(LENS, layout, numbers[2])
    query = strided_randn((len(slots), 4 * group, layout.head_size), layout.dtype, seed=3)
    dynamic = torch.tensor([[True, True, False, True], [True, True, True, False]])
    for op in (retrieve, retrieve_reference):
        out_table, out_lens = run(op, cache, query, slots, dynamic, numbers)
        for row, slot in enumerate(slots):
            for head in range(4):
                length = int(cache.lens[slot, head])
                num_pages = -(-length // layout.page_tokens)
                kept = -(-int(out_lens[row, head]) // layout.page_tokens)
                out_pages = out_table[row, head, :kept].tolist()
                assert (out_table[row, head, kept:] == -1).all()
                assert num_pages - kept == (length - int(out_lens[row, head])) / layout.page_tokens
                if dynamic[slot, head]:
                    queries = query[row, head * group : (head + 1) * group]
                    check_head(cache, slot, head, queries, numbers, out_pages)
                else:
                    assert out_pages == cache.table[slot, head, :num_pages].tolist()
                    assert kept == num_pages


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [32, 40, 64, 128, 256])
def test_head_sizes(instruction_set: str, head_size: int, dtype: torch.dtype) -> None:
    check_retrieve(PageLayout(16, head_size, dtype), group=2, numbers=(0.4, 1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(instruction_set: str, dtype: torch.dtype) -> None:
    """Digests have another type than keys, so pages lie apart by other numbers of elements."""
    for head_size in (32, 72):
        check_retrieve(PageLayout(16, head_size, dtype, is_quantised=True), 2, (0.4, 1, 2))


@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("page_tokens", [8, 16, 256])
def test_groups_and_pages(instruction_set: str, page_tokens: int, group: int) -> None:
    check_retrieve(PageLayout(page_tokens, 32, torch.float32), group, (0.3, 1, 1), (0, 1, 1))


@pytest.mark.parametrize("window_pages", [1, 2, 70])
@pytest.mark.parametrize("sink_pages", [0, 1, 70])
@pytest.mark.parametrize("ratio", [1e-6, 0.25, 0.99])
def test_shares(ratio: float, sink_pages: int, window_pages: int) -> None:
    numbers = (ratio, sink_pages, window_pages)
    check_retrieve(PageLayout(16, 32, torch.float32), group=2, numbers=numbers)


def test_keep_ratio_one_is_the_input() -> None:
    cache = digested_cache(LENS, PageLayout(16, 32, torch.float32))
    dynamic = torch.ones(2, 4, dtype=torch.bool)
    for op in (retrieve, retrieve_reference):
        table, lens = run(op, cache, torch.ones(2, 8, 32), [0, 1], dynamic, (1.0, 1, 1))
        assert torch.equal(table, cache.table)
        assert torch.equal(lens, cache.lens)


def test_later_page_wins_a_tie(instruction_set: str) -> None:
    cache = digested_cache([[100]], PageLayout(8, 32, torch.float32))
    cache.pool.digests[cache.table[0, 0, :12].long()] = 1.0
    dynamic = torch.ones(1, 1, dtype=torch.bool)
    for op in (retrieve, retrieve_reference):
        table, lens = run(op, cache, torch.ones(1, 1, 32), [0], dynamic, (5 / 13, 1, 1))
        assert table[0, 0, :5].tolist() == cache.table[0, 0, [0, 9, 10, 11, 12]].tolist()
        assert lens.item() == 4 * 8 + 4


def test_one_query_head_is_enough(instruction_set: str) -> None:
    """The group takes the maximum: a mean would drown the one head that looks for page 3."""
    cache = digested_cache([[100]], PageLayout(8, 32, torch.float32))
    cache.pool.digests[cache.table[0, 0, :12].long()] = 0.0
    cache.pool.digests[cache.table[0, 0, 3].long(), 0, 0] = 1.0
    query = torch.zeros(1, 4, 32)
    query[0, :, 0] = torch.tensor([-1.0, -1.0, 1.0, -1.0])
    dynamic = torch.ones(1, 1, dtype=torch.bool)
    for op in (retrieve, retrieve_reference):
        table, _ = run(op, cache, query, [0], dynamic, (0.2, 1, 1))
        assert table[0, 0, :3].tolist() == cache.table[0, 0, [0, 3, 12]].tolist()


def test_wrong_arguments_are_refused() -> None:
    cache = digested_cache([[100]], PageLayout(8, 32, torch.float32))
    dynamic = torch.ones(1, 1, dtype=torch.bool)
    query = torch.ones(1, 1, 32)
    for numbers in ((0.0, 1, 1), (1.1, 1, 1), (0.5, -1, 1), (0.5, 1, 0)):
        with pytest.raises(ValueError, match="keep_ratio must be in"):
            run(retrieve, cache, query, [0], dynamic, numbers)
    with pytest.raises(ValueError, match="slot 1 of row 0 is not one of 1"):
        run(retrieve, cache, query, [1], dynamic, (0.5, 1, 1))
