"""What recall takes of a quota, and where the prompt's last token then stands."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.arithmetic.recall import Recall


@st.composite
def quotas(draw: st.DrawFn) -> Quota:
    all_heads = draw(st.integers(1, 200))
    page_tokens = draw(st.sampled_from([8, 16, 64]))
    numbers: dict[str, Any] = {
        "page_tokens": page_tokens,
        "num_layers": draw(st.integers(1, 40)),
        "chunk_tokens": draw(st.integers(1, 9000)),
        "decode_interval_tokens": draw(st.integers(1, 1100)),
        "recall": Recall(
            num_heads=draw(st.integers(1, all_heads)),
            all_heads=all_heads,
            page_words=page_tokens * draw(st.sampled_from([32, 64, 128, 256])),
            code_words=draw(st.integers(1, 4)),
            slots_share=draw(st.floats(0.01, 1)),
            max_index_share=draw(st.floats(0.01, 1)),
        ),
    }
    smallest = Quota(blocks=10**6, **numbers).min_blocks
    return Quota(blocks=smallest + draw(st.integers(0, 500)), **numbers)


@given(quotas(), st.integers(1, 300_000))
def test_index_recalled_and_resident_tokens_are_the_budget_at_most(
    quota: Quota, prompt_tokens: int
) -> None:
    room = quota.recall_room(prompt_tokens)
    if room is None:
        return
    recall = quota.recall
    assert recall is not None
    of_recalling = recall.num_heads * (room.index_pages + room.slot_pages) * quota.page_tokens
    total_tokens = recall.all_heads * room.resident_tokens + of_recalling
    assert total_tokens <= recall.all_heads * quota.budget_tokens
    assert room.index_pages * recall.index_tokens(room.entry_tokens) >= prompt_tokens
    assert room.resident_tokens >= 0
    most_index, most_slots = quota.most_recall_pages(prompt_tokens)
    assert room.index_pages <= most_index
    assert room.slot_pages <= most_slots
    longest_tokens = quota.max_head_tokens + room.slot_pages * quota.page_tokens
    width_tokens = quota.table_width_pages * quota.page_tokens
    assert longest_tokens + quota.decode_interval_tokens <= width_tokens


@given(quotas(), st.integers(1, 300_000))
def test_the_last_token_of_a_prompt_that_recalls_comes_by_itself(
    quota: Quota, prompt_tokens: int
) -> None:
    recalls = quota.recall_room(prompt_tokens) is not None
    end_tokens = quota.chunks_end(prompt_tokens)
    assert end_tokens == prompt_tokens - recalls
    start = max(0, end_tokens - 1)
    if recalls:
        assert quota.next_stop(start, prompt_tokens) == end_tokens
        assert quota.next_stop(end_tokens, prompt_tokens) == prompt_tokens
        assert quota.compresses_after(end_tokens, prompt_tokens)
        assert not quota.compresses_after(prompt_tokens, prompt_tokens)
    interval = quota.decode_interval_tokens
    grown = [
        n
        for n in range(prompt_tokens, end_tokens + 3 * interval + 1)
        if quota.compacts_before(n, prompt_tokens)
    ]
    if not quota.fits(prompt_tokens):
        assert grown == [end_tokens + times * interval for times in (1, 2, 3)]


def test_a_longer_index_leaves_less_until_it_is_coarser() -> None:
    """The arithmetic of a model of 28 layers and 4 KV heads of 128 in bfloat16, quota 3,072."""
    quota = Quota(
        blocks=192,
        page_tokens=16,
        num_layers=28,
        chunk_tokens=1024,
        decode_interval_tokens=64,
        recall=Recall(
            num_heads=37,
            all_heads=112,
            page_words=2048,
            code_words=4,
            slots_share=0.5,
            max_index_share=0.5,
        ),
    )
    assert quota.budget_tokens == 2955
    rooms = [quota.recall_room(n) for n in (8_192, 65_536, 131_072, 262_144, 1_000_000, 2_000_000)]
    assert [room and room.entry_tokens for room in rooms] == [1, 1, 1, 2, 8, None]
    assert [room and room.index_pages for room in rooms] == [17, 131, 261, 261, 261, None]
    assert [room and room.slot_pages for room in rooms] == [89, 70, 49, 49, 49, None]
    assert [room and room.resident_tokens for room in rooms] == [2394, 1892, 1316, 1316, 1316, None]


@pytest.mark.parametrize(
    ("num_heads", "blocks", "interval_tokens"),
    [(37, 70, 1024), (112, 74, 1024), (37, 10, 64), (37, 192, 64)],
)
def test_tables_have_room_for_every_prompt(
    num_heads: int, blocks: int, interval_tokens: int
) -> None:
    """A coarser index leaves more for recalled tokens, so a longer prompt may have more of them.

    And none between two that recall is served without: that was so where an index that is as fine
    as its share allows leaves no page.
    """
    recall = Recall(
        num_heads=num_heads,
        all_heads=112,
        page_words=2048,
        code_words=4,
        slots_share=0.5,
        max_index_share=0.5,
    )
    quota = Quota(
        blocks=blocks,
        page_tokens=16,
        num_layers=28,
        chunk_tokens=1024,
        decode_interval_tokens=interval_tokens,
        recall=recall,
    )
    lengths = range(quota.tokens + 1, 300_000, 61)
    rooms = [quota.recall_room(n) for n in lengths]
    most_index, most_slots = quota.most_recall_pages(300_000)
    found = [room for room in rooms if room is not None]
    assert found and max(room.slot_pages for room in found) <= most_slots
    assert max(room.index_pages for room in found) <= most_index
    last = max(index for index, room in enumerate(rooms) if room is not None)
    assert None not in rooms[:last]
