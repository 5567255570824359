"""Which tokens a look-ahead runs, that it is no one's prefix, and who knows it for one."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_budgetkv.scheduler.lookahead import (
    LookaheadParams,
    Lookaheads,
    make_lookahead,
    parent_of,
    text_tokens,
)


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


def sent(request: Request) -> NewRequestData:
    """What a worker in another process gets of a new request."""
    data = NewRequestData.from_request(request, block_ids=([],))
    return pickle.loads(pickle.dumps(data))


def test_it_runs_with_the_adapter_of_its_parent() -> None:
    """Else it would ask another model's question."""
    parent = make_request(list(range(40)))
    parent.lora_request = LoRARequest("adapter", 1, "somewhere")
    ahead = make_lookahead(parent, 16, 16)
    assert ahead is not None and ahead.lora_request is parent.lora_request


def test_a_worker_is_told_for_whom_a_look_ahead_runs() -> None:
    ahead = make_lookahead(make_request(list(range(40))), 16, 16)
    assert ahead is not None
    assert parent_of(sent(ahead)) == "r"


@pytest.mark.parametrize("request_id", ["r#kv-lookahead", "kv-lookahead-0", "r"])
def test_no_client_passes_for_a_look_ahead(request_id: str) -> None:
    """Not by its id, not by what it sends: parameters that arrive are of vLLM's own class."""
    forged = LookaheadParams(max_tokens=1, parent_id="r", extra_args={"parent_id": "r"})
    arrived = MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(forged))
    request = make_request([1, 2])
    request.request_id, request.sampling_params = request_id, arrived
    assert parent_of(sent(request)) is None


def test_look_aheads_of_one_parent_differ() -> None:
    """So that none has the id of a request that came, or that comes, from a client."""
    aheads = [make_lookahead(make_request([1, 2]), 16, 16) for _ in range(3)]
    ids = {ahead.request_id for ahead in aheads if ahead is not None}
    assert len(ids) == 3 and "r" not in ids


def test_the_table_of_look_aheads() -> None:
    table, parent = Lookaheads(), make_request([1, 2])
    ahead = make_lookahead(parent, 16, 16)
    assert ahead is not None and ahead.request_id not in table
    table.hold(parent, ahead)
    assert ahead.request_id in table and "r" not in table and [*table] == [ahead.request_id]
    assert table.cancel("other") is None and table.release("r") is None
    assert table.release(ahead.request_id) is parent
    assert table.release(ahead.request_id) is None and table.cancel("r") is None
    # its last output is still on the way
    assert ahead.request_id in table and not [*table]
    table.forget_gone(alive={ahead.request_id})
    assert ahead.request_id in table
    table.forget_gone(alive={"r"})
    assert ahead.request_id not in table


def test_a_cancelled_parent_is_not_released() -> None:
    table, parent = Lookaheads(), make_request([1, 2])
    ahead = make_lookahead(parent, 16, 16)
    assert ahead is not None
    table.hold(parent, ahead)
    assert table.cancel("r") == (parent, ahead.request_id)
    assert table.release(ahead.request_id) is None
