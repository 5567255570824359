"""Which tokens stay: one policy per file, chosen by name."""

from __future__ import annotations

from vllm_budgetkv.policy.base import Observation, Policy, Retention, Tier
from vllm_budgetkv.policy.full import FullPolicy
from vllm_budgetkv.policy.hybrid import HybridPolicy
from vllm_budgetkv.policy.options import PolicyOptions
from vllm_budgetkv.policy.window import WindowPolicy

POLICIES: dict[str, type[Policy]] = {
    "full": FullPolicy,
    "window": WindowPolicy,
    "hybrid": HybridPolicy,
}


def make_policy(name: str, options: PolicyOptions, page_tokens: int) -> Policy:
    """Build the policy that the user named.

    Args:
        name: a key of `POLICIES`.
        options: knobs of all policies.
        page_tokens: tokens of a page.

    Raises:
        ValueError: the name is unknown, or the options do not fit the policy or the page.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[name](options, page_tokens)


__all__ = [
    "POLICIES",
    "Observation",
    "Policy",
    "PolicyOptions",
    "Retention",
    "Tier",
    "make_policy",
]
