"""Plans of the pretrained model: what is stored in 8 bits, and that finished runs are found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.real import lab, worker
from benchmarks.real.lab import Outcome, Setup
from benchmarks.real.plan import FULL, HYBRID, PLANS, Run
from benchmarks.real.results import summarise
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
    """The key of a run that was kept before there were these fields."""
    assert HYBRID.key("model") == "1fb9af5d2598acb9"
    others = {
        replace(HYBRID, cache_dtype="fp8").key("model"),
        replace(HYBRID, dtype="bfloat16").key("model"),
        replace(HYBRID, asks_before=True).key("model"),
        replace(FULL, stock=True).key("model"),
        FULL.key("model"),
        HYBRID.key("model"),
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


class StartedError(Exception):
    """In place of an engine."""


@pytest.mark.parametrize(("stock", "block_tokens"), [(False, 16), (True, 32)])
def test_the_engine_is_told_what_is_stored(
    monkeypatch: pytest.MonkeyPatch, stock: bool, block_tokens: int
) -> None:
    told: dict[str, Any] = {}

    def start(**arguments: Any) -> None:
        told.update(arguments)
        raise StartedError

    monkeypatch.setattr("vllm.LLM", start)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda model: None)
    monkeypatch.setattr(worker, "make_examples", lambda *_: [])
    monkeypatch.setattr(worker, "free_memory", lambda: None)
    run = replace(FULL, cache_dtype="fp8", dtype="bfloat16", stock=stock)
    with pytest.raises(StartedError):
        worker.measure(run, "model", "abc")
    assert (told["kv_cache_dtype"], told["dtype"]) == ("fp8", "bfloat16")
    assert told["block_size"] == block_tokens
    assert ("additional_config" in told) != stock
    with pytest.raises(StartedError):
        lab.TextLab(Setup(model="model"))
    assert (told["kv_cache_dtype"], told["dtype"]) == ("auto", "float32")
