"""The ops of host memory in Triton against naive ones and their references."""

from __future__ import annotations

import pytest
import torch

from tests.ops import test_recall as naive
from tests.ops.recall_factory import make_remembered
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops import encode, mark, recall
from vllm_budgetkv.ops.reference.mark import mark as mark_reference
from vllm_budgetkv.ops.triton import recall as launcher
from vllm_budgetkv.ops.triton.arrival import counters
from vllm_budgetkv.ops.triton.mark import RUN_PAGES


@pytest.mark.parametrize("dtype", naive.DTYPES, ids=str)
def test_quantised_pages(dtype: torch.dtype) -> None:
    naive.check_quantised(dtype, (300, 133))


@pytest.mark.parametrize("dtype", naive.DTYPES, ids=str)
@pytest.mark.parametrize(("head_size", "entry_tokens"), [(32, 1), (40, 2), (80, 8)])
def test_codes(head_size: int, entry_tokens: int, dtype: torch.dtype) -> None:
    naive.test_a_code_is_the_nearest_level(encode, head_size, entry_tokens, dtype)


def test_a_channel_without_deviation() -> None:
    naive.test_a_channel_without_deviation_is_its_mean(encode)


@pytest.mark.parametrize("entry_tokens", [1, 2, 8])
@pytest.mark.parametrize("dtype", naive.DTYPES, ids=str)
def test_marks(dtype: torch.dtype, entry_tokens: int) -> None:
    naive.test_marks_are_the_positions_behind_the_recall_pages(mark, dtype, entry_tokens)


def test_marks_of_several_runs() -> None:
    """Of more index pages than one program has, with older marks in them and recalled tokens."""
    made = make_remembered([5300], PageLayout(8, 40, torch.bfloat16), held_share=0.1)
    num_pages = -(-5300 // made.index_tokens)
    assert num_pages > RUN_PAGES
    made.cache.pool.index_words[made.recalls.table[0, 0, :num_pages].long()] = -1
    recalled = made.cache.table[0, 0, :2].long()
    made.cache.pool.positions[recalled] = torch.arange(16, dtype=torch.int32).view(2, 8)
    twin = made.clone()
    mark(0, made.cache.heads, made.recalls)
    mark_reference(0, twin.cache.heads, twin.recalls)
    assert torch.equal(made.cache.pool.raw, twin.cache.pool.raw)


@pytest.mark.parametrize("dtype", naive.DTYPES, ids=str)
@pytest.mark.parametrize(("head_size", "entry_tokens"), [(32, 1), (40, 2), (80, 8)])
def test_recall_head_sizes(head_size: int, entry_tokens: int, dtype: torch.dtype) -> None:
    layout = PageLayout(16, head_size, dtype)
    made = make_remembered((300, 133), layout, entry_tokens=entry_tokens)
    naive.check_steps(recall, made, [1, 0], group=2)
    assert (counters(4, torch.device("cpu")) == 0).all()


@pytest.mark.parametrize(("page_tokens", "group"), [(8, 1), (8, 7), (64, 3)])
def test_recall_groups_and_pages(page_tokens: int, group: int) -> None:
    """Slots out of order, one without a row, and heads that recall among heads that do not."""
    made = make_remembered(
        (300, 90, 131),
        PageLayout(page_tokens, 32, torch.bfloat16),
        recall_pages=1,
        recalling=[[True, False], [True, True], [False, True]],
    )
    naive.check_steps(recall, made, [2, 0], group=group)


@pytest.mark.parametrize("max_runs", [1, 2, 64])
def test_recall_of_several_runs_and_blocks(monkeypatch: pytest.MonkeyPatch, max_runs: int) -> None:
    """Of more tokens than are ranked at once, in pages that share a program or do not."""
    monkeypatch.setattr(launcher, "MAX_RUNS", max_runs)
    layout = PageLayout(32, 32, torch.bfloat16)
    made = make_remembered([4300], layout, held_share=0.1, recall_pages=9)
    naive.check_steps(recall, made, [0], group=1)


def test_recall_takes_equal_tokens_from_the_end() -> None:
    naive.test_equal_tokens_are_taken_from_the_end(recall)


def test_recall_of_many_equal_tokens() -> None:
    """Those that come back lie in two blocks; held ones among them stay out."""
    made = make_remembered([2100], PageLayout(32, 32, torch.bfloat16), held_share=0.4)
    naive.prepare(made)
    naive.run(recall, made, torch.zeros(1, 2, 32, dtype=torch.bfloat16), [0])
    lacking = sorted(set(range(2100)) - set(made.held[0][0].tolist()))
    assert naive.recalled(made, 0, 0) == lacking[-64:]


def test_recall_of_rows_without_a_token() -> None:
    naive.test_rows_without_a_token_change_nothing(recall)


def test_recall_leaves_out_what_it_cannot_fetch() -> None:
    """Slots out of range, a token without a block, a lost index page, too few tokens to recall."""
    made = make_remembered([90, 40], naive.LAYOUT, held_share=0.1)
    naive.prepare(made)
    before = made.cache.pool.raw.clone()
    query = torch.zeros(2, 2, 32)
    assert not naive.run(recall, made, query, [-1, 2]).any()
    assert torch.equal(made.cache.pool.raw, before)
    # of equal tokens the last ones come back, and block 4 has those from 64 to 79
    lacking = sorted(set(range(90)) - set(made.held[0][0].tolist()))[-32:]
    made.tier.blocks[0, 4] = made.tier.tokens.shape[0]
    made.recalls.table[1, 0, 0] = -1
    moved = naive.run(recall, made, query, [0, 1])
    fetched = [position for position in lacking if not 64 <= position < 80]
    pages = made.cache.table[:, 0, :2].long()
    assert [p for p in made.cache.pool.positions[pages[0]].flatten() if p >= 0] == fetched
    assert moved.tolist() == [[len(fetched), 0], [0, 0]]
    assert (made.cache.pool.positions[pages[1]] == -1).all()


def test_recall_of_less_than_its_pages_hold() -> None:
    made = make_remembered([40], naive.LAYOUT, held_share=0.5)
    naive.prepare(made)
    lacking = sorted(set(range(40)) - set(made.held[0][0].tolist()))
    assert naive.run(recall, made, torch.zeros(1, 2, 32), [0])[0, 0] == len(lacking)
    positions = made.cache.pool.positions[made.cache.table[0, 0, :2].long()].flatten().tolist()
    assert positions == lacking + [-1] * (32 - len(lacking))
