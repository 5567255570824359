"""Ranges and derived numbers of the policy options."""

from __future__ import annotations

import pytest

from vllm_budgetkv.policy import PolicyOptions, make_policy


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
        ("hybrid_pool_tokens", 6),
        ("force_class", "sparse"),
        ("merge", "average"),
        ("text_share", float("nan")),
    ],
)
def test_out_of_range_names_option_and_value(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}; set it to a value"):
        PolicyOptions(**{name: value})


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
