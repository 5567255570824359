"""Which tokens a look-ahead runs, and that it is no one's prefix."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from vllm_budgetkv.scheduler.lookahead import lookahead_id, make_lookahead, parent_of, text_tokens


def feature(offset: int, length: int) -> SimpleNamespace:
    return SimpleNamespace(mm_position=SimpleNamespace(offset=offset, length=length))


@pytest.mark.parametrize(
    ("items", "limit", "expected"),
    [
        ([], 100, list(range(20))),
        ([], 3, [17, 18, 19]),
        ([(2, 10)], 100, [0, 1, *range(12, 20)]),
        ([(2, 10)], 9, [1, *range(12, 20)]),
        ([(2, 10)], 4, [16, 17, 18, 19]),
        ([(0, 5), (8, 4)], 100, [5, 6, 7, *range(12, 20)]),
        ([(8, 4), (0, 5)], 100, [5, 6, 7, *range(12, 20)]),
        ([(0, 20)], 100, []),
    ],
    ids=["text", "cut", "video", "cut-before", "cut-behind", "two", "any-order", "no-text"],
)
def test_text_tokens(items: list[tuple[int, int]], limit: int, expected: list[int]) -> None:
    features = [feature(*item) for item in items]
    assert text_tokens(list(range(20)), features, limit, limit) == expected


@pytest.mark.parametrize(
    ("items", "limit", "enough", "expected"),
    [
        ([(2, 10)], 100, 8, list(range(12, 20))),
        ([(2, 10)], 100, 9, [0, 1, *range(12, 20)]),
        ([(2, 10)], 5, 8, list(range(15, 20))),
        ([(0, 5), (8, 4), (14, 4)], 100, 4, [12, 13, 18, 19]),
        ([], 100, 3, list(range(20))),
    ],
    ids=["question", "template-alone", "cut", "question-between", "text"],
)
def test_text_in_front_of_an_item_is_left_out_once_there_is_enough(
    items: list[tuple[int, int]], limit: int, enough: int, expected: list[int]
) -> None:
    features = [feature(*item) for item in items]
    assert text_tokens(list(range(20)), features, limit, enough) == expected


def make_request(prompt: list[int] | None) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(max_tokens=50, temperature=0.7),
        pooling_params=None,
        arrival_time=12.0,
        priority=3,
    )


def test_the_internal_request() -> None:
    parent = make_request(list(range(40)))
    ahead = make_lookahead(parent, 16, 16)
    assert ahead is not None
    assert ahead.prompt_token_ids == list(range(24, 40))
    assert ahead.max_tokens == 1
    assert (ahead.priority, ahead.arrival_time) == (3, 12.0)
    assert ahead.skip_reading_prefix_cache and not ahead.block_hashes
    assert parent_of(ahead.request_id) == "r" and ahead.request_id == lookahead_id("r")
    assert parent_of("r") is None
