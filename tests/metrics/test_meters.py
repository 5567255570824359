"""Metrics of requests: what is counted, and that vLLM's clearing of its registry hides none."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.reader import get_metrics_snapshot

from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.metrics.message import KEY, REPORT, Growth, Message
from vllm_budgetkv.metrics.meters import PREFIX, meters
from vllm_budgetkv.start.front_end import _followed, _process_outputs

LABELS = {"model_name": "m", "engine": "1"}
MESSAGE = Message(
    counts=True,
    **LABELS,
    policy="hybrid",
    peak_blocks=12,
    full_cache_blocks=100,
    evicted_tokens={"static": 30, "dynamic": 7},
    retained_mass=0.75,
    compression_seconds=0.02,
)


def value(name: str, **labels: str) -> float:
    found = REGISTRY.get_sample_value(PREFIX + name, LABELS | labels)
    return 0.0 if found is None else found


def counted() -> list[float]:
    """Everything that `MESSAGE` moves, in one order."""
    return [
        value("requests_total", policy="hybrid", outcome="stop"),
        value("request_peak_blocks_sum", policy="hybrid"),
        value("request_peak_blocks_bucket", policy="hybrid", le="8.0"),
        value("request_peak_blocks_bucket", policy="hybrid", le="16.0"),
        value("reclaimed_blocks_total"),
        value("evicted_tokens_total", head_class="static"),
        value("evicted_tokens_total", head_class="dynamic"),
        value("retained_mass_sum"),
        value("compression_seconds_count"),
    ]


def test_a_request_that_ended_is_counted_once() -> None:
    before = counted()
    meters().ended(MESSAGE, "stop")
    moved = [new - old for new, old in zip(counted(), before, strict=True)]
    assert moved == [1, 12, 0, 1, 88, 30, 7, 0.75, 1]


def test_one_that_dropped_nothing_counts_as_a_request_alone() -> None:
    before = counted()
    plain = replace(
        MESSAGE,
        full_cache_blocks=3,
        peak_blocks=4,
        evicted_tokens=None,
        retained_mass=None,
        compression_seconds=None,
    )
    meters().ended(plain, "stop")
    moved = [new - old for new, old in zip(counted(), before, strict=True)]
    assert moved == [1, 4, 1, 1, 0, 0, 0, 0, 0]


def test_what_came_back_and_who_holds_host_memory() -> None:
    names = [
        ("recall_steps_total", {}),
        ("recalled_tokens_total", {"kind": "kept"}),
        ("recalled_tokens_total", {"kind": "moved"}),
        ("moved_bytes_total", {}),
    ]
    before = [value(name, **labels) for name, labels in names]
    recalled = {"steps": 5, "tokens": 100, "moved_tokens": 30, "moved_bytes": 7680}
    use = {"all": 8, "held": 3, "findable": 2}
    meters().told(replace(MESSAGE, recalled=recalled, host_blocks=use))
    after = [value(name, **labels) for name, labels in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [5, 70, 30, 7680]
    assert {state: value("host_blocks", state=state) for state in use} == use


def test_they_are_seen_again_after_vllm_cleared_its_own() -> None:
    """It does so whenever an engine starts in the process."""
    meters().has_quota("m", 64)
    unregister_vllm_metrics()
    assert not value("requests_total", policy="hybrid", outcome="stop")
    meters().ended(MESSAGE, "stop")
    assert value("requests_total", policy="hybrid", outcome="stop") >= 1
    names = {metric.name for metric in get_metrics_snapshot()}
    assert {f"{PREFIX}requests", f"{PREFIX}quota_blocks", f"{PREFIX}retained_mass"} <= names


class FrontEnd:
    """vLLM's output processor as far as it is asked; `stops` are ended at a stop string.

    Args:
        alive: ids of its requests.
    """

    def __init__(self, *alive: str) -> None:
        self.request_states = dict.fromkeys(alive)
        self.stops: list[str] = []

    def see(self, *outputs: Any) -> list[Any]:
        """What a client's outputs travel with, once ours have passed."""

        def original(processor: Any, found: Any, extra: int) -> SimpleNamespace:
            assert processor is self and extra == 5
            seen.extend(deepcopy(one.kv_transfer_params) for one in found)
            return SimpleNamespace(reqs_to_abort=self.stops)

        seen: list[Any] = []
        processed = _process_outputs(original, self, outputs, 5)  # type: ignore[arg-type]
        assert processed.reqs_to_abort is self.stops
        return seen


def output(params: dict[str, Any] | None, ends: str | None = "stop", num_tokens: int = 1) -> Any:
    return SimpleNamespace(
        request_id="r",
        kv_transfer_params=params,
        finish_reason=ends,
        new_token_ids=[7] * num_tokens,
    )


@pytest.mark.parametrize(
    ("params", "left"),
    [
        (None, None),
        ({"other": 1}, {"other": 1}),
        (MESSAGE.as_params(), None),
        ({"budgetkv": {"policy": "x"}, **MESSAGE.as_params()}, {"budgetkv": {"policy": "x"}}),
    ],
    ids=["nothing", "another's", "alone", "with-a-report"],
)
def test_the_message_reaches_no_client(params: Any, left: Any) -> None:
    before = value("requests_total", policy="hybrid", outcome="stop")
    counts = KEY in (params or {})
    assert FrontEnd("r").see(output(params)) == [left]
    assert value("requests_total", policy="hybrid", outcome="stop") - before == counts


QUOTA = Quota(blocks=12, page_tokens=8, num_layers=3, chunk_tokens=24, decode_interval_tokens=8)


def first_token(prompt_tokens: int, *, counts: bool = True, says: bool = True) -> dict[str, Any]:
    """What travels with the first token of a request that has stop strings."""
    report = {
        "prompt_tokens": prompt_tokens,
        "peak_blocks": QUOTA.blocks_for(prompt_tokens, prompt_tokens),
        "full_cache_blocks": -(-prompt_tokens // 8),
        "output_compactions": 0,
    }
    message = replace(
        MESSAGE,
        counts=counts,
        peak_blocks=report["peak_blocks"],
        full_cache_blocks=report["full_cache_blocks"],
        grows=Growth(quota=asdict(QUOTA), prompt_tokens=prompt_tokens),
    )
    return ({REPORT: report} if says else {}) | message.as_params()


@pytest.mark.parametrize("prompt_tokens", [20, 300])
def test_a_stop_string_ends_a_request_with_its_report(prompt_tokens: int) -> None:
    """The engine core does not know of it: what came with the first token is kept up to date."""
    front_end = FrontEnd("r")
    before = counted()
    front_end.see(output(first_token(prompt_tokens), ends=None))
    for _ in range(20):
        (params,) = front_end.see(output(None, ends=None, num_tokens=2))
    front_end.stops = ["r"]
    (params,) = front_end.see(output(None, ends=None))
    seen_tokens = prompt_tokens + 41
    peak_blocks = QUOTA.blocks_for(seen_tokens, prompt_tokens)
    assert params == {
        REPORT: {
            "prompt_tokens": prompt_tokens,
            "peak_blocks": peak_blocks,
            "full_cache_blocks": -(-seen_tokens // 8),
            "output_compactions": QUOTA.compactions(seen_tokens, prompt_tokens),
        }
    }
    moved = [new - old for new, old in zip(counted(), before, strict=True)]
    assert moved[0] == 1 and moved[1] == peak_blocks
    assert not _followed[front_end]  # type: ignore[index]


def test_one_that_the_engine_core_ends_is_counted_there() -> None:
    front_end = FrontEnd("r")
    before = value("requests_total", policy="hybrid", outcome="stop")
    front_end.see(output(first_token(300), ends=None))
    front_end.see(output(MESSAGE.as_params()))
    assert value("requests_total", policy="hybrid", outcome="stop") - before == 1
    assert not _followed[front_end]  # type: ignore[index]


def test_what_a_message_says_of_others_counts_whatever_becomes_of_its_request() -> None:
    """Its client may leave, and one that ended here is not counted again."""
    front_end = FrontEnd("r")
    recalled = {"steps": 5, "tokens": 100, "moved_tokens": 30, "moved_bytes": 7680}
    before = value("recall_steps_total"), counted()[0]
    first = first_token(300)
    first[KEY]["recalled"] = recalled
    front_end.see(output(first, ends=None))
    front_end.stops = ["r"]
    front_end.see(output(None, ends=None))
    del front_end.request_states["r"]
    front_end.stops = []
    # the engine core ended it in the same step
    front_end.see(output(replace(MESSAGE, recalled=recalled).as_params()))
    assert value("recall_steps_total") - before[0] == 10
    assert counted()[0] - before[1] == 1


def test_nothing_is_kept_of_one_whose_client_left() -> None:
    front_end = FrontEnd("r", "other")
    front_end.see(output(first_token(300), ends=None))
    assert list(_followed[front_end]) == ["r"]  # type: ignore[index]
    del front_end.request_states["r"]
    front_end.see()
    assert not _followed[front_end]  # type: ignore[index]


def test_neither_report_nor_metrics_where_nobody_wants_them() -> None:
    front_end = FrontEnd("r")
    before = value("requests_total", policy="hybrid", outcome="stop")
    front_end.see(output(first_token(300, counts=False, says=False), ends=None))
    front_end.stops = ["r"]
    assert front_end.see(output(None, ends=None)) == [None]
    assert value("requests_total", policy="hybrid", outcome="stop") == before
