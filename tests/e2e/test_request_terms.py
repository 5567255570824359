"""Requests with terms of their own beside others, in real engines and through a real server.

What a request gets that asks for a quota or a policy is what a server started with it gives.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.engines import run, run_budgets, tokens_of
from tests.e2e.test_bound import ENGINE, QUOTA_BLOCKS, budget
from tests.e2e.test_reuse import by_name

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

CONTENT = [{"text": "Look."}, {"video": 20, "seed": 3}, {"text": "Which letter?"}]
LARGEST = 16
ASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "less": {"kv_page_quota": 11},
    "more": {"kv_page_quota": LARGEST},
    "window": {"kv_policy": "window"},
    "snapkv": {"kv_policy": "snapkv", "kv_page_quota": LARGEST},
    "blind": {"kv_lookahead": 0},
    "pins": {"kv_page_quota": LARGEST, "kv_pin": "60:68,90:92"},
    "full": {"kv_policy": "full"},
}


def requests_of(names: list[str], *, ask: bool = True) -> list[dict[str, Any]]:
    asks = {name: ASKS.get(name) if ask else None for name in names}
    return [
        {"name": name, "content": CONTENT, "max_tokens": 24, "asks": asks[name]} for name in names
    ]


def offering(**options: Any) -> dict[str, Any]:
    return budget(
        "hybrid",
        max_page_quota=LARGEST,
        request_policies="window,snapkv,full",
        probe_tokens=8,
        **options,
    )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, vision_model: Path) -> dict[str, Any]:
    """All of them in one engine, with their records."""
    folder = tmp_path_factory.mktemp("mixed")
    report = folder / "report.jsonl"
    # a request is reported in the step behind its last
    last = {"name": "last", "content": [{"text": "Hi"}], "max_tokens": 4, "arrives": 200}
    asked = [*requests_of(list(ASKS)), last]
    options = offering(report_file=str(report))
    engine = {**ENGINE, "num_gpu_blocks_override": 140}
    answer = run(folder, vision_model, asked, budget=options, **engine)
    records = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    answer["records"] = by_name({record["request_id"]: record for record in records})
    answer["held"] = by_name(answer["held"])
    del answer["answers"]["last"]
    return answer


def test_each_is_inside_its_own_quota(mixed: dict[str, Any]) -> None:
    assert mixed["running_at_once"] >= 4 and mixed["engine"]["leftovers"] == 0
    quotas = {name: ASKS[name].get("kv_page_quota", QUOTA_BLOCKS) for name in ASKS}
    held = {name: mixed["held"][name] for name in ASKS}
    longest_blocks = held.pop("full")
    del quotas["full"]
    assert held == quotas
    assert longest_blocks > LARGEST, "the full cache must be more than any quota"


def test_each_is_as_on_a_server_of_its_own(
    tmp_path: Path, vision_model: Path, mixed: dict[str, Any]
) -> None:
    found = tokens_of(mixed)
    alone = [
        budget("window", probe_tokens=8),
        budget("snapkv", probe_tokens=8, page_quota=LARGEST),
        budget("hybrid", probe_tokens=8),
        {"policy": "full"},
    ]
    engine = {**ENGINE, "num_gpu_blocks_override": 700}
    answers = run_budgets(tmp_path, vision_model, requests_of(["x"]), alone, **engine)
    for name, policy in (("plain", "hybrid"), *((p, p) for p in ("window", "snapkv", "full"))):
        assert found[name] == tokens_of(answers[policy])["x"], name
    for name, options in {
        "less": {"page_quota": 11},
        "more": {"page_quota": LARGEST},
        "blind": {"lookahead": False},
    }.items():
        options = budget("hybrid", probe_tokens=8) | options
        answer = run(tmp_path, vision_model, requests_of(["x"]), budget=options, **engine)
        assert found[name] == tokens_of(answer)["x"], name


def test_records_say_who_had_what(mixed: dict[str, Any]) -> None:
    records = mixed["records"]
    for name, asked in ASKS.items():
        assert records[name]["policy"] == asked.get("kv_policy", "hybrid")
    pinned = [*range(60, 68), 90, 91]
    kept = records["pins"]["kept_counts"]
    num_heads = sum(records["pins"]["heads"].values())
    counts = [kept["static"][place] + kept["dynamic"][place] for place in pinned]
    assert counts == [num_heads] * len(pinned)
    plain = records["more"]["kept_counts"]
    assert min(plain["static"][place] + plain["dynamic"][place] for place in pinned) < num_heads


def test_the_full_cache_beside_quotas_is_stocks(
    tmp_path: Path, vision_model: Path, mixed: dict[str, Any]
) -> None:
    # the smallest block of stock vLLM on a CPU
    engine = {**ENGINE, "block_size": 32, "num_gpu_blocks_override": 200}
    stock = run(tmp_path, vision_model, requests_of(["full"], ask=False), stock=True, **engine)
    assert tokens_of(mixed)["full"] == tokens_of(stock)["full"]


def test_both_runners_agree(tmp_path: Path, vision_model: Path, mixed: dict[str, Any]) -> None:
    engine = {**ENGINE, "num_gpu_blocks_override": 140}
    options, asked = offering(), requests_of(list(ASKS))
    answer = run(tmp_path, vision_model, asked, budget=options, runner="v2", **engine)
    assert tokens_of(answer) == tokens_of(mixed)
