"""Ranges and derived numbers of the policy options."""

from __future__ import annotations

from dataclasses import fields

import pytest

from vllm_budgetkv.policy import POLICIES, PolicyOptions, make_policy
from vllm_budgetkv.policy.option import about, kind_of
from vllm_budgetkv.policy.options import PolicyFlags
from vllm_budgetkv.start.config import BudgetConfig

KNOBS = {item.name for item in fields(PolicyOptions)} - {item.name for item in fields(PolicyFlags)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sink_tokens", -1),
        ("window_tokens", -1),
        ("probe_tokens", 0),
        ("top_k_min", 0),
        ("dynamic_unit_tokens", 0),
        ("dynamic_weight", 0.0),
        ("static_weight", 101.0),
        ("static_threshold", 1.1),
        ("hysteresis", -0.1),
        ("floor_ratio", 1.5),
        ("text_share", -0.5),
        ("template_tokens", 0),
        ("recent_frames_share", 1.5),
        ("redundancy_share", -0.1),
        ("uniform_share", 2.0),
        ("frame_share", 2.0),
        ("top_k_ratio", 0.0),
        ("retrieval_ratio", 0.0),
        ("pool_width_tokens", 6),
        ("pool_width_tokens", -1),
        ("reach_tokens", -1),
        ("text_share", float("nan")),
        ("text_share", "half"),
        ("top_k_min", 8.0),
        ("sink_tokens", True),
        ("sink_tokens", None),
        ("seed", 0.5),
        ("head_scores_file", 7),
        ("head_scores_file", ""),
    ],
)
def test_what_an_option_may_not_be(name: str, value: object) -> None:
    """Bug: knobs of another type were taken, or ended the start with a TypeError."""
    spelling = name if name in KNOBS else "--kv-" + name.replace("_", "-")
    with pytest.raises(ValueError, match=f"{spelling} must be .*; got {value!r}$"):
        PolicyOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [("force_class", "sparse", "static, dynamic"), ("merge", "average", "none, value")],
)
def test_no_choice_names_the_choices(name: str, value: str, choices: str) -> None:
    flag = "--kv-" + name.replace("_", "-")
    with pytest.raises(ValueError, match=f"unknown {flag} '{value}': choose one of {choices}$"):
        PolicyOptions(**{name: value})


def test_flags_and_knobs() -> None:
    """What the class of a field says, its `option` or `knob` says too; nothing stands twice."""
    flags = {item.name for item in fields(PolicyFlags)}
    assert {item.name for item in fields(PolicyOptions) if about(item).has_flag} == flags
    assert not KNOBS & {item.name for item in fields(BudgetConfig)}


@pytest.mark.parametrize("options", [BudgetConfig, PolicyOptions], ids=lambda c: c.__name__)
def test_every_option_says_what_it_is(options: type) -> None:
    for item in fields(options):
        said = about(item)
        assert len(said.help) > 15 and said.help.endswith("."), item.name
        assert set(said.policies) <= set(POLICIES), item.name
        number = kind_of(item) in ("int", "float") and item.name != "seed"
        assert number == (said.within is not None), item.name
        assert not number or said.metavar, item.name


@pytest.mark.parametrize(("held", "k"), [(1, 64), (640, 64), (641, 65), (4000, 400)])
def test_top_k(held: int, k: int) -> None:
    assert PolicyOptions().top_k_tokens(held) == k


@pytest.mark.parametrize(("page", "sinks", "window"), [(16, 1, 5), (64, 1, 2), (256, 1, 2)])
def test_retrieval_pages(page: int, sinks: int, window: int) -> None:
    options = PolicyOptions()
    pages = (options.retrieval_sink_pages(page), options.retrieval_window_pages(page))
    assert pages == (sinks, window)


def test_unit_must_divide_the_page() -> None:
    with pytest.raises(ValueError, match="dynamic_unit_tokens is 12; .* page of 16 tokens"):
        make_policy("hybrid", PolicyOptions(dynamic_unit_tokens=12), 16)


def test_options_of_one_policy_are_refused_by_the_others() -> None:
    for name, policy in POLICIES.items():
        if name == "hybrid":
            policy.check(PolicyOptions(merge="value"))
            continue
        with pytest.raises(
            ValueError, match=f"--kv-merge value is of --kv-policy hybrid; .* {name}$"
        ):
            policy.check(PolicyOptions(merge="value"))


def test_a_policy_demands_what_it_needs() -> None:
    """`tests/start/test_config.py` shows that `BudgetConfig` asks."""
    with pytest.raises(ValueError, match="streammem asks with what runs ahead"):
        POLICIES["streammem"].check(PolicyOptions(), lookahead=False)
    with pytest.raises(ValueError, match="needs --kv-head-scores-file: set it to a JSON file"):
        make_policy("sparsemm", PolicyOptions(), 16)
