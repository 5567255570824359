"""Which tokens `recall` takes, exactly: from the keys that its own launches ranked them by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.ops import test_recall as naive
from tests.ops.factories import batch_rows, strided_randn
from tests.ops.recall_factory import Remembered, make_remembered
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops import recall
from vllm_budgetkv.ops.triton import recall as launcher
from vllm_budgetkv.ops.triton.arrival import counters
from vllm_budgetkv.ops.triton.recall_narrow import HELD, KEY_MASK, NUM_BINS
from vllm_budgetkv.ops.triton.scratch import scratch

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYOUT = PageLayout(8, 40, torch.bfloat16)
NUM_HEADS = 2


def repeat_codes(made: Remembered, num_kinds: int, seed: int) -> None:
    """Let every index page say the same of its mean, and its entries one of a few things."""
    pool, generator = made.cache.pool, torch.Generator().manual_seed(seed)
    pages = made.recalls.table[made.recalls.table < pool.num_pages].long().unique()
    num_words = LAYOUT.code_words
    entries = LAYOUT.index_tokens(made.entry_tokens) // made.entry_tokens
    kinds = torch.randint(-(2**31), 2**31, (num_kinds, num_words), generator=generator)
    of_entries = torch.randint(num_kinds, (len(pages), entries), generator=generator)
    words = kinds.int()[of_entries].flatten(1)
    pool.index_words[pages, : entries * num_words] = words
    pool.digests[pages] = pool.digests[pages[0]].clone()


def ranked(made: Remembered, query: torch.Tensor, row: int, head: int) -> torch.Tensor:
    """int32 [n_max]: the keys that the last call left behind."""
    most_tokens = made.tier.blocks.shape[1] * made.tier.page_tokens
    keys = scratch("recall keys", (len(query) * NUM_HEADS, most_tokens), query)
    return keys.view(torch.int32)[row * NUM_HEADS + head] & KEY_MASK.value


def expected(was: list[int], keys: torch.Tensor, count: int) -> list[int]:
    """Positions of a head's places, of equal tokens the last, from those that stood there."""
    order = keys.flip(0).argsort(descending=True, stable=True)[:count]
    best = {len(keys) - 1 - i for i in order.tolist() if keys[len(keys) - 1 - i] > HELD.value}
    missing = iter(sorted(best - set(was)))
    return [token if token in best else next(missing, -1) for token in was]


def positions(made: Remembered, slot: int, head: int) -> list[int]:
    count = int(made.recalls.num_recalled[slot, head])
    pages = made.cache.table[slot, head, : count // LAYOUT.page_tokens].long()
    return made.cache.pool.positions[pages].flatten().tolist()


def check_call(
    made: Remembered, query: torch.Tensor, slots: Sequence[int], tokens: Sequence[int]
) -> None:
    """One call, of rows of which some may have no token; it leaves zeros where it counts."""
    heads = [(row, slot, head) for row, slot in enumerate(slots) for head in range(NUM_HEADS)]
    old = {(slot, head): positions(made, slot, head) for _, slot, head in heads}
    moved = torch.zeros_like(made.cache.lens)
    recall(
        *(query, made.cache.heads, batch_rows(slots, tokens), made.recalls, made.tier),
        *(0.3, moved),
    )
    for row, slot, head in heads:
        was, now = old[slot, head], positions(made, slot, head)
        if tokens[row] == 0:
            assert now == was
            continue
        num_tokens = int(made.recalls.num_tokens[slot, head])
        keys = ranked(made, query, row, head)[:num_tokens]
        assert now == expected(was, keys, len(now))
        assert int(moved[slot, head]) == len(set(now) - set(was) - {-1})
        if -1 not in now:
            assert naive.recalled(made, slot, head) == now
    num_tasks = len(slots) * NUM_HEADS
    for count in (num_tasks, num_tasks * NUM_BINS.value):
        assert not counters(count, query.device).any()


@pytest.mark.parametrize(
    ("num_kinds", "max_runs", "entry_tokens"),
    [(1, 1, 1), (1, 128, 1), (3, 3, 1), (3, 128, 4), (60, 128, 1)],
)
def test_ties_across_runs(
    monkeypatch: pytest.MonkeyPatch, num_kinds: int, max_runs: int, entry_tokens: int
) -> None:
    """Rows of unlike lengths, one without a token first; two calls over the same memory."""
    monkeypatch.setattr(launcher, "MAX_RUNS", max_runs)
    made = make_remembered(
        (1100, 90, 400),
        LAYOUT,
        recall_pages=4,
        recalling=[[True, False], [True, True], [True, True]],
        entry_tokens=entry_tokens,
    )
    naive.prepare(made)
    repeat_codes(made, num_kinds, seed=max_runs)
    for step in range(2):
        query = strided_randn((3, 2 * NUM_HEADS, 40), LAYOUT.dtype, seed=step)
        check_call(made, query, [2, 0, 1], [1, 1, step])


@pytest.mark.parametrize("entry_tokens", [1, 8])
def test_more_tokens_and_places_than_a_block(
    monkeypatch: pytest.MonkeyPatch, entry_tokens: int
) -> None:
    """Of one run; calls of two rows and of one take turns, and a slot recalls nothing."""
    monkeypatch.setattr(launcher, "MAX_RUNS", 1)
    made = make_remembered((2300, 150), LAYOUT, recall_pages=36, entry_tokens=entry_tokens)
    made.recalls.num_recalled[1] = 0
    naive.prepare(made)
    for step, slots in enumerate(([0, 1], [0], [1, 0])):
        query = strided_randn((len(slots), NUM_HEADS, 40), LAYOUT.dtype, seed=step)
        check_call(made, query, slots, [1] * len(slots))


def test_a_query_that_is_no_number() -> None:
    """Takes the last of the tokens that are not held; and the next call is right again."""
    made = make_remembered([400], LAYOUT, recall_pages=4)
    naive.prepare(made)
    query = strided_randn((1, NUM_HEADS, 40), LAYOUT.dtype, seed=1)
    check_call(made, query * torch.nan, [0], [1])
    lacking = sorted(set(range(400)) - set(made.held[0][0].tolist()))
    assert positions(made, 0, 0) == lacking[-32:]
    check_call(made, query, [0], [1])


def test_less_than_a_head_recalls() -> None:
    """All that a head lacks stands in some of its places, and the others are empty."""
    made = make_remembered([130], LAYOUT, held_share=0.8, recall_pages=6)
    naive.prepare(made)
    for step in range(2):
        query = strided_randn((1, NUM_HEADS, 40), LAYOUT.dtype, seed=step)
        check_call(made, query, [0], [1])
    assert positions(made, 0, 0).count(-1) == 48 - 130 + len(made.held[0][0])
