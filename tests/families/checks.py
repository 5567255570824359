"""What the answers of a family's engines show, and whether that is what we promise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.families.asked import LONG_OUTPUT_TOKENS, NUM_LONG, TIMES

if TYPE_CHECKING:
    from tests.families.family import Family

RUNNER_MODULES = {
    "v1": "vllm.v1.worker.cpu_model_runner",
    "v2": "vllm.v1.worker.cpu.model_runner",
}
# of log-probabilities and of turned queries, in float32
TOLERANCE = 1e-5
# bfloat16: nearer than that, a token's rounding may decide
TIE, NOISE = 0.15, 0.15


def lossless(family: Family, stock: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Compare all tokens of all answers, and how likely each of them was."""
    worst, ties, num_tokens = 0.0, 0, 0
    for name, found in stock["answers"].items():
        mine = ours["answers"][name]
        for place, token in enumerate(found["tokens"]):
            likely, mine_likely = found["logprobs"][place], mine["logprobs"][place]
            if (other := mine["tokens"][place]) != token:
                gap = likely[str(token)] - likely.get(str(other), -99.0)
                assert family.dtype == "bfloat16" and gap < TIE, f"{name}: token {place} differs"
                ties += 1
                break
            worst = max(worst, abs(likely[str(token)] - mine_likely[str(token)]))
            num_tokens += 1
    allowed = TOLERANCE if family.dtype == "float32" else NOISE
    assert worst <= allowed, f"log-probabilities differ by {worst:.1e}"
    return {"tokens": num_tokens, "ties": ties, "error": worst}


def on_the_path(mode: str, stock: dict[str, Any], ours: dict[str, Any]) -> None:
    """Stock is vLLM as it is, and ours runs where it was asked to."""
    assert "BUDGETKV" not in stock["engine"]["backends"]
    assert "BUDGETKV" in ours["engine"]["backends"]
    runner = "v2" if mode == "v2" else "v1"
    assert ours["engine"]["runner"] == RUNNER_MODULES[runner], ours["engine"]["runner"]


def depends(stock: dict[str, Any]) -> None:
    """Answers that do not depend on what is read would prove nothing."""
    tokens = {name: tuple(found["tokens"]) for name, found in stock["answers"].items()}
    others = {name: found for name, found in tokens.items() if name != "again"}
    assert len(set(others.values())) == len(others), f"equal answers: {tokens}"
    assert all(len(set(found)) > 3 for found in tokens.values()), f"dull answers: {tokens}"


def bound(family: Family, answer: dict[str, Any]) -> dict[str, Any]:
    """Four at once, prompts of ten quotas, and never more than the quota."""
    quota_tokens = family.page_quota * answer["block_tokens"]
    prompts = {name: found["prompt_tokens"] for name, found in answer["answers"].items()}
    assert len(prompts) == NUM_LONG
    assert min(prompts.values()) >= TIMES * quota_tokens, f"{prompts} of {quota_tokens}"
    # what runs ahead of a prompt may fit fewer
    held = answer["held"]
    assert max(held.values()) == family.page_quota, held
    assert sum(blocks == family.page_quota for blocks in held.values()) >= NUM_LONG, held
    assert answer["running_at_once"] == NUM_LONG, answer["running_at_once"]
    assert answer["engine"]["leftovers"] == 0
    for found in answer["answers"].values():
        assert len(found["tokens"]) == LONG_OUTPUT_TOKENS
    return {"quota_tokens": quota_tokens, "prompt_tokens": min(prompts.values())}


def probed(family: Family, proof: dict[str, Any]) -> dict[str, Any]:
    """Queries that are turned equal true ones."""
    assert proof["layers"], "no start looked at queries"
    if family.dtype == "float32":
        assert proof["error"] <= TOLERANCE, f"turned queries are off by {proof['error']:.1e}"
    return proof
