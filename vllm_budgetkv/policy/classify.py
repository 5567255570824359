"""Static and dynamic heads (HybridKV, https://arxiv.org/abs/2604.05887)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_budgetkv.policy.base import Observation
    from vllm_budgetkv.policy.options import PolicyOptions


def classify(observation: Observation, options: PolicyOptions) -> torch.Tensor:
    """Tell heads whose attention sits on few tokens from heads that look about.

    A KV head is static if even its least concentrated query head puts `static_threshold` of its
    attention on the top k tokens: what one query head needs, the KV head must keep. A head that
    had a class keeps it within `hysteresis` of the threshold, so that it does not flip with every
    chunk. Without a probe a head keeps its class; a head without one is dynamic, because a wrong
    "dynamic" costs time but a wrong "static" loses tokens.

    Args:
        observation: `concentration`, `was_static` and `lens` are read.
        options: `static_threshold`, `hysteresis`, `force_class`.

    Returns:
        bool [H], True for static.
    """
    lens, was_static = observation.lens, observation.was_static
    if options.force_class is not None:
        return torch.full_like(lens, options.force_class == "static", dtype=torch.bool)
    concentration = observation.concentration
    if concentration is None:
        if was_static is not None:
            return was_static
        return torch.zeros_like(lens, dtype=torch.bool)
    if was_static is None:
        return concentration >= options.static_threshold
    stays_static = concentration >= options.static_threshold - options.hysteresis
    becomes_static = concentration >= options.static_threshold + options.hysteresis
    return torch.where(was_static, stays_static, becomes_static)
