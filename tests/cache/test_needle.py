"""A needle in a haystack: what is asked for survives 20 chunks of prefill, and decode finds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cache.client import LOOKAHEAD, Client
from tests.cache.scripted import BLOCKS, Haystack, Scripted, options, small_quota, video_client
from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.layout import PagePool
from vllm_budgetkv.ops import digest

CLASSES = pytest.mark.parametrize("force_class", ["static", "dynamic"])
NEEDLE = 101
QUESTION = list(range(474, 480))
ALL_TEXT = [*range(6), *QUESTION]


def search(
    policy: str, asking: list[int], *, looks_ahead: bool, needle: int = NEEDLE, **changes: Any
) -> int:
    """(layer, head) pairs of 6 that hold the needle after a prefill of 20 chunks."""
    lab = Haystack(
        policy,
        small_quota(),
        pool_blocks=BLOCKS,
        options=options(**changes),
        needle=needle,
        asking=asking,
    )
    client = video_client()
    if looks_ahead:
        lab.look_ahead(client, Client(client.request_id + LOOKAHEAD, 0))
    lab.run(client, outputs=1)
    assert lab.cache.slots.requests["video"].compressions == 20 - 3
    return lab.heads_with_needle(client)


NEEDLES = pytest.mark.parametrize("needle", [41, 101, 205, 301])


@CLASSES
@NEEDLES
def test_needle_that_all_text_asks_for_survives(force_class: str, needle: int) -> None:
    assert (
        search("hybrid", ALL_TEXT, looks_ahead=False, needle=needle, force_class=force_class) == 6
    )


@CLASSES
@NEEDLES
def test_needle_that_only_the_question_asks_for_survives_with_look_ahead(
    force_class: str, needle: int
) -> None:
    assert search("hybrid", QUESTION, looks_ahead=True, needle=needle, force_class=force_class) == 6


@CLASSES
@NEEDLES
def test_needle_that_only_the_question_asks_for_is_lost_without_look_ahead(
    force_class: str, needle: int
) -> None:
    """Before the question the bank knows other text alone, to which the needle is like any token.

    One of six heads may keep it by chance.
    """
    kept = search("hybrid", QUESTION, looks_ahead=False, needle=needle, force_class=force_class)
    assert kept <= 1


@NEEDLES
def test_window_loses_the_needle(needle: int) -> None:
    assert search("window", ALL_TEXT, looks_ahead=False, needle=needle) == 0


def test_a_key_against_all_others_survives() -> None:
    """`keydiff` keeps what has the most contrast: one key is turned away from all of the others."""
    lab = Haystack(
        "keydiff", small_quota(), pool_blocks=BLOCKS, options=options(), needle=NEEDLE, asking=[]
    )
    # where keys turn slowly, and are empty but for the needle's
    keys = lab.script[:, 1, :, :, -lab.head_size // 8 :]
    keys += 4
    keys[:, NEEDLE] -= 8
    client = lab.run(video_client(), outputs=1)
    assert lab.heads_with_needle(client) == 6


@pytest.mark.parametrize("ratio", [0.4, 0.6])
def test_decode_reads_the_page_of_the_needle(ratio: float) -> None:
    """Dynamic heads find it by its digest, among pages that they do not read."""
    output = list(range(480, 500))
    lab = Haystack(
        "hybrid",
        small_quota(),
        pool_blocks=BLOCKS,
        options=options(force_class="dynamic", retrieval_ratio=ratio),
        needle=NEEDLE,
        asking=[*ALL_TEXT, *output],
    )
    client = lab.run(video_client(), outputs=20)
    assert lab.heads_with_needle(client) == 6
    for step in range(1, 20):
        for layer in range(3):
            out = lab.outputs["video"][-3 * step + layer][0].unflatten(0, (2, 2))
            value = lab.script[layer, 2, NEEDLE, :2, None]
            assert torch.cosine_similarity(out, value, dim=-1).min() > 0.8


def test_pages_that_grew_since_their_digest_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where decode grows by more than the recent window between two digests."""
    lab = Scripted(
        "hybrid",
        small_quota(blocks=16, decode_interval_tokens=30),
        pool_blocks=16,
        options=options(force_class="dynamic", retrieval_ratio=0.1, window_tokens=4),
    )
    retrieve, skipped = ops.retrieve, []

    def spy(query: Any, heads: Any, rows: Any, *rest: Any) -> None:
        retrieve(query, heads, rows, *rest)
        (pool, table, lens), slot = heads, int(rows.slots[0])
        for head, row in enumerate(table[slot]):
            fresh = PagePool(pool.raw.clone(), pool.layout)
            digest(ops.PagedHeads(fresh, row[None], lens[slot, head][None]))
            read = rest[-1].table[0, head]
            unread = [page for page in row.tolist() if page >= 0 and page not in read]
            skipped.extend(unread)
            assert torch.equal(pool.digests[unread], fresh.digests[unread])

    monkeypatch.setattr(ops, "retrieve", spy)
    lab.run(video_client(), outputs=70)
    assert skipped, "otherwise nothing was tested"
