"""Plans of the pretrained model: what is stored in 8 bits, and that finished runs are found."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

import pytest

from benchmarks.real.lab import Outcome
from benchmarks.real.plan import FULL, HYBRID, LATER_FIELDS, PLANS, Run
from benchmarks.real.results import summarise
from benchmarks.real.tasks import SUITE
from vllm_budgetkv.start.config import BudgetConfig

# head-pages of 16 tokens with heads of 64, both dtypes with a digest and positions, in steps of 256
PAGE_BYTES = {"auto": 4608, "fp8": 2560}


@pytest.mark.parametrize("plan", PLANS)
def test_titles_of_a_plan_differ(plan: str) -> None:
    titles = [run.title for run in PLANS[plan]]
    assert len(set(titles)) == len(titles)


def test_what_is_stored_stands_in_the_title() -> None:
    run = replace(HYBRID, cache_dtype="fp8")
    assert run.title == "hybrid at 10 % of 2,048 tokens, fp8"
    assert HYBRID.title == "hybrid at 10 % of 2,048 tokens"


@pytest.mark.parametrize("plan", ["stored", "stored-text", "stored-frames"])
def test_8_bits_are_asked_at_equal_tokens_and_at_equal_bytes(plan: str) -> None:
    def quotas(cache_dtype: str) -> list[int | None]:
        runs = [run for run in PLANS[plan] if run.cache_dtype == cache_dtype and not run.stock]
        return [run.budget().get("quota_tokens") for run in runs]

    plain, quantised = quotas("auto"), quotas("fp8")
    assert quantised[:-1] == plain and plain[0] is None
    assert plain[1] is not None
    pages = plain[1] // 16 * PAGE_BYTES["auto"] // PAGE_BYTES["fp8"]
    assert quantised[-1] == 16 * pages
    assert {run.dtype for run in PLANS[plan]} == {"bfloat16"}


def test_vllm_alone_has_no_option_of_the_plugin() -> None:
    assert replace(FULL, stock=True).budget() == {}
    with pytest.raises(ValueError, match="no policy 'hybrid'"):
        replace(HYBRID, stock=True)


@pytest.mark.parametrize("run", PLANS["stored"], ids=lambda run: run.title)
def test_every_run_can_start(run: Run) -> None:
    assert run.stock or BudgetConfig.from_mapping(run.budget()).policy == run.policy


def test_a_new_field_leaves_the_keys_of_finished_runs() -> None:
    """The key as it was written before there were these fields."""
    run = {name: value for name, value in asdict(HYBRID).items() if name not in LATER_FIELDS}
    parts = {"run": run, "model": "model", "suite": SUITE}
    before = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    assert HYBRID.key("model") == before
    others = {
        replace(HYBRID, cache_dtype="fp8").key("model"),
        replace(HYBRID, dtype="bfloat16").key("model"),
        replace(HYBRID, asks_before=True).key("model"),
        replace(FULL, stock=True).key("model"),
        FULL.key("model"),
        before,
    }
    assert len(others) == 6


def test_vllm_alone_leaves_no_record() -> None:
    run = replace(FULL, stock=True, cache_dtype="fp8", tasks=("single",), count=1)
    outcome = Outcome("single", 0.0, True, True, True, -0.5, None, 2000, {})
    result = summarise(run, [outcome], 1.0, "abc")
    assert (result.quota_blocks, result.peak_blocks, result.block_bytes) == (0, 0.0, 0)
    assert (result.cache_dtype, result.right) == ("fp8", {"single": "1"})
    with pytest.raises(ValueError, match="1 of 1 requests left no record"):
        summarise(replace(run, stock=False), [outcome], 1.0, "abc")
