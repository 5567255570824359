"""Metrics of requests: what is counted, and that vLLM's clearing of its registry hides none."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.reader import get_metrics_snapshot

from vllm_budgetkv.metrics.message import KEY, Message
from vllm_budgetkv.metrics.meters import PREFIX, meters
from vllm_budgetkv.start.front_end import _process_outputs

LABELS = {"model_name": "m", "engine": "1"}
MESSAGE = Message(
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


def test_they_are_seen_again_after_vllm_cleared_its_own() -> None:
    """It does so whenever an engine starts in the process."""
    meters().has_quota("m", 64)
    unregister_vllm_metrics()
    assert not value("requests_total", policy="hybrid", outcome="stop")
    meters().ended(MESSAGE, "stop")
    assert value("requests_total", policy="hybrid", outcome="stop") >= 1
    names = {metric.name for metric in get_metrics_snapshot()}
    assert {f"{PREFIX}requests", f"{PREFIX}quota_blocks", f"{PREFIX}retained_mass"} <= names


def output(params: dict[str, Any] | None) -> Any:
    return SimpleNamespace(kv_transfer_params=params, finish_reason="stop")


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
    outputs = [output(params)]
    counts = KEY in (params or {})
    seen = _process_outputs(lambda self, found, extra: (self, found, extra), "self", outputs, 5)
    assert seen == ("self", outputs, 5)
    assert outputs[0].kv_transfer_params == left
    assert value("requests_total", policy="hybrid", outcome="stop") - before == counts
