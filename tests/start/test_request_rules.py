"""What a request may ask for: everything in range is given, all else is refused in its words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_budgetkv.arithmetic.pinned import Pinned
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.start.config import BudgetConfig
from vllm_budgetkv.start.request_rules import RequestRules

PROMPT_TOKENS = 5000
QUOTA = Quota(blocks=64, page_tokens=16, num_layers=2, chunk_tokens=256, decode_interval_tokens=64)
EVERYTHING = replace(QUOTA, blocks=1000, compresses=False)
KEYS = ["kv_policy", "kv_page_quota", "kv_pin", "kv_lookahead", "kv_lookahead_source", "kv_reuse"]


def rules(**options: Any) -> RequestRules:
    """Of a server whose requests may ask for other policies and for more."""
    options = {"request_policies": "full,window", "max_page_quota": 96, **options}
    config = BudgetConfig(policy="hybrid", page_quota=64, **options)
    quotas = {name: EVERYTHING if name == "full" else QUOTA for name in config.policies}
    return RequestRules(config, quotas)


def refusal(asked: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as error:
        rules(**options).of(asked, PROMPT_TOKENS)
    return str(error.value)


def test_who_asks_for_nothing_gets_the_servers() -> None:
    others = {"kv_transfer_params": {"a": 1}, "kv_cache_report_mode": "x", "mine": [1]}
    for asked in (None, {}, others):
        assert rules().of(asked, PROMPT_TOKENS) == rules().default
    assert rules().default.quota == QUOTA and rules().default.policy == "hybrid"


@pytest.mark.parametrize("blocks", [QUOTA.min_blocks, 48, 64, 96, 80.0])
def test_a_quota_of_its_own(blocks: float) -> None:
    terms = rules().of({"kv_page_quota": blocks}, PROMPT_TOKENS)
    assert terms == replace(rules().default, quota=replace(QUOTA, blocks=int(blocks)))


@pytest.mark.parametrize("blocks", [QUOTA.min_blocks - 1, 97, 0, -5, 10**30])
def test_a_quota_out_of_range_is_told_the_range(blocks: int) -> None:
    least = QUOTA.min_blocks
    assert f"from {least} to 96 blocks of 16 tokens" in refusal({"kv_page_quota": blocks})


def test_without_a_largest_quota_it_may_only_ask_for_less() -> None:
    assert "to 64 blocks" in refusal({"kv_page_quota": 65}, max_page_quota=None)


def test_another_policy() -> None:
    full = rules().of({"kv_policy": "full"}, PROMPT_TOKENS)
    assert (full.policy, full.quota, full.lookahead_tokens) == ("full", EVERYTHING, 0)
    window = rules().of({"kv_policy": "window", "kv_page_quota": 32}, PROMPT_TOKENS)
    assert (window.policy, window.quota.blocks, window.lookahead_tokens) == ("window", 32, 0)
    assert rules().of({"kv_policy": "hybrid"}, PROMPT_TOKENS) == rules().default


def test_a_policy_that_the_operator_does_not_offer() -> None:
    said = refusal({"kv_policy": "full"}, request_policies=None)
    assert "kv_policy must be hybrid" in said and "--kv-request-policies" in said
    assert "hybrid or full or window" in refusal({"kv_policy": "snapkv"})


def test_the_full_cache_has_no_quota() -> None:
    said = refusal({"kv_policy": "full", "kv_page_quota": 32})
    assert "kv_page_quota means nothing" in said


def test_pinned_ranges_are_taken_from_the_budget() -> None:
    terms = rules().of({"kv_pin": "0:128, 300:310"}, PROMPT_TOKENS)
    assert terms.pinned == Pinned(((0, 128), (300, 310)))
    assert terms.quota.budget_tokens == QUOTA.budget_tokens - 138
    assert terms.quota.max_head_tokens <= QUOTA.max_head_tokens
    same = rules().of({"kv_pin": ["0:128", "300:310"]}, PROMPT_TOKENS)
    assert same == terms
    full = rules().of({"kv_policy": "full", "kv_pin": "0:128"}, PROMPT_TOKENS)
    assert (full.pinned, full.quota) == (Pinned(), EVERYTHING)


def test_as_much_may_be_pinned_as_leaves_room() -> None:
    most_tokens = (64 - QUOTA.min_blocks) * 16
    terms = rules().of({"kv_pin": f"0:{most_tokens}"}, PROMPT_TOKENS)
    assert terms.quota.blocks == 64 >= terms.quota.min_blocks
    assert f"at most {most_tokens} leave" in refusal({"kv_pin": f"0:{most_tokens + 1}"})
    larger = rules().of({"kv_pin": f"0:{most_tokens + 1}", "kv_page_quota": 96}, PROMPT_TOKENS)
    assert larger.quota.pinned_tokens == most_tokens + 1


def test_what_is_pinned_is_in_the_prompt() -> None:
    assert "position 5001, but the prompt has 5000" in refusal({"kv_pin": "4990:5001"})


def test_look_ahead_and_reuse() -> None:
    default = rules().default
    assert default.lookahead_tokens == 256 and default.reuses
    assert rules().of({"kv_lookahead": 0}, PROMPT_TOKENS).lookahead_tokens == 0
    on = rules(lookahead=False).of({"kv_lookahead": True}, PROMPT_TOKENS)
    assert on.lookahead_tokens == 256
    template = rules().of({"kv_lookahead_source": "template"}, PROMPT_TOKENS)
    assert template.lookahead_tokens == BudgetConfig().template_tokens
    assert not rules().of({"kv_reuse": 0.0}, PROMPT_TOKENS).reuses
    assert rules().of({"kv_reuse": 1}, PROMPT_TOKENS).reuses
    assert "started with --no-kv-reuse" in refusal({"kv_reuse": 1}, reuse=False)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"kv_page_quta": 3}, "kv_page_quta is nothing .* choose among kv_policy"),
        ({"kv_head_scores_file": "a"}, "is nothing that a request may ask for"),
        ({"kv_page_quota": "48"}, "must be a whole number; got '48'"),
        ({"kv_page_quota": 48.5}, "must be a whole number"),
        ({"kv_page_quota": True}, "must be a whole number"),
        ({"kv_page_quota": float("nan")}, "must be a whole number"),
        ({"kv_page_quota": float("inf")}, "must be a whole number"),
        ({"kv_page_quota": [48]}, "must be a whole number"),
        ({"kv_policy": 1}, "kv_policy must be a string"),
        ({"kv_pin": 5}, "kv_pin must be a string"),
        ({"kv_pin": []}, "kv_pin must be a string"),
        ({"kv_pin": "5"}, "kv_pin must be ranges of positions"),
        ({"kv_lookahead": 2}, "kv_lookahead must be 0 or 1"),
        ({"kv_lookahead": "1"}, "kv_lookahead must be 0 or 1"),
        ({"kv_lookahead_source": "word"}, "must be question or text or template"),
        ({"kv_reuse": None}, "kv_reuse must be 0 or 1"),
    ],
)
def test_a_mistake_is_told(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rules().of(asked, PROMPT_TOKENS)


def test_a_quota_that_holds_everything_leaves_nothing_to_ask_for() -> None:
    config = BudgetConfig(policy="hybrid", page_quota=64)
    fitting = RequestRules(config, {"hybrid": replace(QUOTA, compresses=False)})
    with pytest.raises(ValueError, match="holds its longest request"):
        fitting.of({"kv_page_quota": 32}, PROMPT_TOKENS)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES |= st.sampled_from(["full", "window", "0:64", "3:70,90:200", "text", 48, 90])


@given(
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=12), VALUES | st.lists(VALUES)),
    st.integers(1, 10_000),
)
def test_whatever_is_asked_is_served_in_bounds_or_refused(
    asked: dict[str, Any], prompt_tokens: int
) -> None:
    served = rules()
    try:
        terms = served.of(asked, prompt_tokens)
    except ValueError as error:
        assert str(error)
        return
    quota = terms.quota
    assert terms.policy in served.config.policies
    assert quota.blocks <= served.largest(terms.policy).blocks
    assert quota.table_width_pages <= served.largest(terms.policy).table_width_pages
    assert not quota.compresses or quota.min_blocks <= quota.blocks
    assert terms.pinned.stop <= prompt_tokens
