"""Plans: the arithmetic of quotas, what is refused, and that every run can start."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.quality.plan import (
    FULL,
    HYBRID,
    PAGE_TOKENS,
    PLANS,
    Run,
    ablation,
)
from benchmarks.quality.reader import SHAPE
from benchmarks.quality.suite import make_examples
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.policy import POLICIES
from vllm_budgetkv.start.config import BudgetConfig

ALL_RUNS = [run for plan in PLANS.values() for run in plan]


@pytest.mark.parametrize(
    ("share", "length_tokens", "quota_tokens"),
    [(0.1, 2048, 200), (0.05, 2048, 96), (0.2, 1024, 200), (0.1, 4096, 408), (0.8, 2048, 1632)],
)
def test_quota_is_a_share_in_whole_pages(
    share: float, length_tokens: int, quota_tokens: int
) -> None:
    run = replace(HYBRID, quota_share=share, length_tokens=length_tokens)
    assert run.quota_tokens == quota_tokens and quota_tokens % PAGE_TOKENS == 0


def test_full_has_no_quota() -> None:
    assert FULL.quota_tokens is None and FULL.budget() == {"policy": "full"}


@pytest.mark.parametrize(("length_tokens", "chunk"), [(1024, 64), (2048, 64), (4096, 128)])
def test_chunks_grow_with_the_prompt(length_tokens: int, chunk: int) -> None:
    assert replace(HYBRID, length_tokens=length_tokens).budget()["chunk_tokens"] == chunk


@pytest.mark.parametrize("run", ALL_RUNS, ids=lambda run: run.title)
def test_every_run_can_start(run: Run) -> None:
    """The options are known, and the quota leaves a budget on the lab's own model."""
    config = BudgetConfig.from_mapping(run.budget())
    Quota(
        blocks=config.quota_blocks(PAGE_TOKENS, 8192),
        page_tokens=PAGE_TOKENS,
        num_layers=SHAPE.layers,
        chunk_tokens=config.chunk_tokens,
        decode_interval_tokens=config.decode_interval_tokens,
        compresses=config.compresses,
    )


@pytest.mark.parametrize("run", ALL_RUNS, ids=lambda run: run.title)
def test_every_run_has_examples(run: Run) -> None:
    for task in run.tasks:
        assert len(make_examples(task, run.length_tokens, 2)) == 2


@pytest.mark.parametrize("plan", PLANS)
def test_titles_of_a_plan_differ(plan: str) -> None:
    titles = [run.title for run in PLANS[plan]]
    assert len(set(titles)) == len(titles)


def test_8_bits_are_asked_at_equal_tokens_and_at_equal_bytes() -> None:
    """Head-pages of 8 tokens with heads of 32: 1,280 bytes in bfloat16, 768 in 8 bits."""
    found = [(run.quota_tokens, run.cache_dtype) for run in PLANS["stored"]]
    assert found[:3] == [(None, "auto"), (96, "auto"), (200, "auto")]
    equal_bytes = [(8 * (pages * 1280 // 768), "fp8") for pages in (12, 25)]
    assert found[3:] == [(None, "fp8"), (96, "fp8"), (200, "fp8"), *equal_bytes]
    assert PLANS["stored"][-1].title.endswith("of 2,048 tokens, fp8")


def test_main_has_every_policy() -> None:
    assert {run.policy for run in PLANS["main"]} == set(POLICIES)


@pytest.mark.parametrize("plan", PLANS)
def test_every_length_has_its_full_cache(plan: str) -> None:
    """Without it no task of that length is known to be solved."""
    full = {run.length_tokens for run in PLANS[plan] if run.quota_share is None}
    assert full == {run.length_tokens for run in PLANS[plan]}


def test_an_ablation_is_one_line() -> None:
    run = ablation("all static", force_class="static")
    base = PLANS["ablations"][1]
    assert run.budget() == base.budget() | {"force_class": "static"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "nearest"}, "nearest"),
        ({"tasks": ("needle", "haystack")}, "haystack"),
        ({"quota_share": None}, "quota_share None"),
        ({"quota_share": 1.5}, "1.5"),
    ],
)
def test_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(HYBRID, **change)


def test_key_names_run_model_and_options() -> None:
    keys = {
        HYBRID.key("model"),
        HYBRID.key("other model"),
        replace(HYBRID, count=3).key("model"),
        replace(HYBRID, options={"merge": "value"}).key("model"),
        replace(HYBRID, oracle=True).key("model"),
        replace(HYBRID, lookahead_layers=(0,)).key("model"),
        replace(HYBRID, cache_dtype="fp8").key("model"),
        replace(HYBRID, dtype="bfloat16").key("model"),
    }
    assert len(keys) == 8
    assert replace(HYBRID).key("model") == HYBRID.key("model")


def test_a_new_field_leaves_the_keys_of_finished_runs() -> None:
    """The key of a run that was kept before there were these fields."""
    assert HYBRID.key("model") == "772f0b344d48f518"
