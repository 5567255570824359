"""A real server under a real Prometheus: every number that the dashboard and the rules ask for."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import openai
import pytest

from benchmarks.server import Server
from tests.e2e.test_serve import ARGUMENTS, QUOTA_BLOCKS, metric, wait_until_idle
from tests.e2e.test_serve_requests import ask, said
from tests.metrics.prometheus import MONITORING, Prometheus

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.engine

OFFERS = ["--kv-request-policies", "window", "--kv-host-memory", "64MiB"]
OFFERS += ["--kv-retrieval-ratio", "1.0", "--kv-probe-tokens", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metrics")


@pytest.fixture(scope="module")
def server(folder: Path, vision_model: Path) -> Iterator[Server]:
    arguments = [*ARGUMENTS, *OFFERS, "--kv-report-file", str(folder / "requests.jsonl")]
    with Server(str(vision_model), arguments, folder / "server.log", dict(os.environ)) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scrapes the server while clients ask."""
    target = server.url.removeprefix("http://")
    with Prometheus(target, tmp_path_factory.mktemp("prometheus")).running() as running:
        yield running


@pytest.fixture(scope="module")
def answers(server: Server, prometheus: Prometheus) -> list[Any]:
    """Of some requests, with scrapes before, between and behind them."""
    client = server.client()
    found = [ask(client)]
    time.sleep(2.5)
    for asked in ({}, {"kv_policy": "window"}, {}):
        found.append(ask(client, **asked))
    # one that ends in the front end is counted too, behind its first token
    text = found[0].choices[0].message.content
    found.append(ask(client, stop=[next(char for char in text[4:] if char not in text[:4])]))
    with pytest.raises(openai.BadRequestError):
        ask(client, kv_page_quota=1)
    wait_until_idle(server)
    time.sleep(2.5)
    return found


def test_the_counters_are_the_sums_of_what_answers_say(server: Server, answers: list[Any]) -> None:
    reports = [said(answer) for answer in answers]
    assert metric(server, "vllm:budgetkv_requests_total") == len(reports)
    assert metric(server, "vllm:budgetkv_refused_requests_total") == 1
    assert metric(server, "vllm:budgetkv_quota_blocks") == QUOTA_BLOCKS
    peaks = [report["peak_blocks"] for report in reports]
    assert metric(server, "vllm:budgetkv_request_peak_blocks_sum") == sum(peaks)
    full = [report["full_cache_blocks"] for report in reports]
    assert metric(server, "vllm:budgetkv_reclaimed_blocks_total") == sum(full) - sum(peaks)
    evicted = 0.0
    for report in reports:
        heads = sum(report["heads"].values())
        kept = sum(
            report["heads"][name] * sum(row.values())
            for name, row in report["kept_tokens_per_head"].items()
        )
        evicted += heads * report["prompt_tokens"] - kept
    # the averages of a report are rounded
    assert metric(server, "vllm:budgetkv_evicted_tokens_total") == pytest.approx(evicted, rel=1e-3)
    assert metric(server, "vllm:budgetkv_compression_seconds_count") == len(reports)
    assert metric(server, "vllm:budgetkv_retained_mass_count") == len(reports) - 1
    assert metric(server, "vllm:kv_cache_usage_perc") == 0


@pytest.mark.usefixtures("answers")
def test_what_came_back_is_that_of_the_records(server: Server, folder: Path) -> None:
    """Of all requests but the last, which is counted with the next."""
    lines = (folder / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    *records, last = map(json.loads, lines)
    assert last["recall_steps"] > 0
    steps, moved_bytes, moved_tokens, tokens = (
        sum(record[name] for record in records)
        for name in ("recall_steps", "moved_bytes", "moved_tokens", "recalled_tokens")
    )
    assert metric(server, "vllm:budgetkv_recall_steps_total") == steps > 0
    assert metric(server, "vllm:budgetkv_moved_bytes_total") == moved_bytes > 0
    assert metric(server, "vllm:budgetkv_recalled_tokens_total") == max(tokens, moved_tokens)
    assert metric(server, "vllm:budgetkv_host_blocks") > 0


def queries() -> list[str]:
    dashboard = json.loads((MONITORING / "grafana.json").read_text(encoding="utf-8"))
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("query", queries())
def test_every_panel_has_an_answer(prometheus: Prometheus, query: str) -> None:
    asked = query.replace("$__rate_interval", "1m").replace("$model", ".*")
    assert prometheus.query(asked), f"no series: {asked}"


@pytest.mark.usefixtures("answers")
def test_prometheus_evaluates_the_rules(prometheus: Prometheus) -> None:
    (group,) = prometheus.get("rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    assert not [rule["lastError"] for rule in group["rules"] if rule.get("lastError")]
