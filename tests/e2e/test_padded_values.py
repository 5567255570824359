"""Values of fewer elements than keys; vLLM itself runs no such model on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.conftest import MODELS
from tests.e2e.engines import tokens_of
from tests.families import asked, checks, run
from tests.families.catalogue import FAMILIES
from vllm_budgetkv.testing import mimo_v2

pytestmark = pytest.mark.engine

FAMILY = FAMILIES["MiMo-V2-Flash"]
SHORT = asked.short_requests(FAMILY)
# of log-probabilities in 8 bits: the noise of two kernels puts a number beside the edge of a
# rounding on its other side, a sixteenth away
ROUNDING = 5e-3


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """Of engines, and of Transformers' class in the place of stock vLLM."""
    full = str(mimo_v2.build_full(MODELS))
    # under its other name, of a class that loads joined projections too
    named = {"architectures": ["MiMoV2ForCausalLM"]}
    in_8_bits = {"model": full, "kv_cache_dtype": "fp8", "hf_overrides": named}
    runs = {
        "fits": {"budget": run.roomy(), "requests": SHORT},
        "tight": {"budget": run.tight(FAMILY), "requests": asked.long_requests(FAMILY)},
        "8 bits": {"budget": run.roomy(), "requests": SHORT, "engine": in_8_bits},
    }
    engine = {**run.arguments_of(FAMILY), "enforce_eager": True}
    judged = {"requests": SHORT, "rounds": False, "model": engine["model"]}
    return {
        **run.ask({"engine": engine, "runs": runs}),
        "judge": run.ask(judged, module=run.JUDGE),
        "judge of 8 bits": run.ask({**judged, "rounds": True, "model": full}, module=run.JUDGE),
    }


def test_a_quota_above_need_changes_nothing(answers: dict[str, Any]) -> None:
    judge, ours = answers["judge"], answers["fits"]
    checks.depends(judge)
    checks.lossless(FAMILY, judge, ours)
    assert ours["engine"]["backends"] == ["BUDGETKV", "CPU_ATTN"]
    assert ours["layers"] == {"full": mimo_v2.num_full_layers(), "windowed": 4}
    assert ours["answers"]["again"]["cached_tokens"] >= 2 * ours["block_tokens"]


def test_long_prompts_stay_inside_the_quota(answers: dict[str, Any]) -> None:
    """With the ledger checked and what is free poisoned after every step."""
    checks.bound(FAMILY, answers["tight"])
    assert answers["tight"]["num_lookaheads"]


def test_8_bit_values_are_rounded_once(answers: dict[str, Any]) -> None:
    """Of full layers alone: vLLM's own 8-bit kernels for CPUs, of windows, round further."""
    judge, ours = answers["judge of 8 bits"], answers["8 bits"]
    assert ours["class"] == "MiMoV2ForCausalLM"
    assert ours["engine"]["backends"] == ["BUDGETKV"]
    assert tokens_of(ours) == tokens_of(judge)
    for name, found in judge["answers"].items():
        mine = ours["answers"][name]["logprobs"]
        for token, likely, other in zip(found["tokens"], found["logprobs"], mine, strict=True):
            assert abs(likely[str(token)] - other[str(token)]) < ROUNDING
