"""What a cache holds its requests to: the policies that they may have, and quotas under them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.arithmetic.terms import Terms
    from vllm_budgetkv.policy import Policy, PolicyOptions


@dataclass(frozen=True)
class Offer:
    """A policy that requests may have.

    Args:
        policy: which tokens stay.
        terms: of a request under it that asks for nothing else.
        largest: the largest quota that a request under it may have.
    """

    policy: Policy
    terms: Terms
    largest: Quota

    @property
    def compresses(self) -> bool:
        """Whether requests under it are ever compressed."""
        return self.policy.compresses and self.largest.compresses


@dataclass(frozen=True)
class Arrival:
    """What is known of a new request beside its prompt.

    Args:
        terms: what it is held to.
        parent_id: id of the request that it looks ahead for; None for a client's.
    """

    terms: Terms
    parent_id: str | None = None


@dataclass(frozen=True)
class Rules:
    """Of one worker.

    Args:
        offers: policies, first that of requests which ask for none.
        options: knobs of all policies.
        num_slots: requests that may hold a slot at once.
        check_ledger: check every table after every step and fill what is free with NaN.
        max_model_tokens: tokens of the longest request.
        host_blocks: of host memory that keeps what quotas drop; 0 for none.
        summarizes: whether it is counted what requests keep of their prompts.
    """

    offers: Sequence[Offer]
    options: PolicyOptions
    num_slots: int
    check_ledger: bool
    max_model_tokens: int = 0
    host_blocks: int = 0
    summarizes: bool = False

    @property
    def policies(self) -> dict[str, Policy]:
        return {offer.terms.policy: offer.policy for offer in self.offers}

    @property
    def shared_blocks(self) -> int:
        """Most blocks whose pages a request shares between its heads; 0 where none does."""
        return max((o.largest.blocks for o in self.offers if o.policy.compresses), default=0)

    @property
    def table_width_pages(self) -> int:
        """Longest list of pages of a head."""
        return max(offer.largest.table_width_pages for offer in self.offers)

    @property
    def recalling(self) -> Quota | None:
        """The largest quota of requests to which dropped tokens come back; None if to none."""
        if not self.host_blocks:
            return None
        found = [offer.largest for offer in self.offers if offer.largest.recall is not None]
        return found[0] if found else None
