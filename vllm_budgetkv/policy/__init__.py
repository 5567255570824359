"""Which tokens stay: one policy per file, chosen by name."""

from __future__ import annotations

from vllm_budgetkv.policy.ada_snapkv import AdaSnapKVPolicy
from vllm_budgetkv.policy.base import Observation, Policy, Retention, Tier
from vllm_budgetkv.policy.cords import CoRDSPolicy
from vllm_budgetkv.policy.full import FullPolicy
from vllm_budgetkv.policy.hybrid import HybridPolicy
from vllm_budgetkv.policy.infinipot_v import InfiniPotVPolicy
from vllm_budgetkv.policy.keydiff import KeyDiffPolicy
from vllm_budgetkv.policy.lookm import (
    LookMAveragePolicy,
    LookMPivotPolicy,
    LookMPolicy,
    LookMWeightedPolicy,
)
from vllm_budgetkv.policy.options import PolicyOptions
from vllm_budgetkv.policy.pyramidkv import PyramidKVPolicy
from vllm_budgetkv.policy.random_ranks import RandomPolicy
from vllm_budgetkv.policy.snapkv import SnapKVPolicy
from vllm_budgetkv.policy.sparsemm import SparseMMPolicy
from vllm_budgetkv.policy.streammem import StreamMemPolicy
from vllm_budgetkv.policy.window import WindowPolicy

POLICIES: dict[str, type[Policy]] = {
    "full": FullPolicy,
    "window": WindowPolicy,
    "hybrid": HybridPolicy,
    "random": RandomPolicy,
    "snapkv": SnapKVPolicy,
    "ada-snapkv": AdaSnapKVPolicy,
    "pyramidkv": PyramidKVPolicy,
    "sparsemm": SparseMMPolicy,
    "keydiff": KeyDiffPolicy,
    "infinipot-v": InfiniPotVPolicy,
    "cords": CoRDSPolicy,
    "streammem": StreamMemPolicy,
    "lookm": LookMPolicy,
    "lookm-average": LookMAveragePolicy,
    "lookm-pivot": LookMPivotPolicy,
    "lookm-weighted": LookMWeightedPolicy,
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
    POLICIES[name].check(options)
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
