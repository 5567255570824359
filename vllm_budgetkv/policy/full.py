"""`full`: every token stays; the cache is ordinary paged attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NoReturn

from vllm_budgetkv.policy.base import Policy

if TYPE_CHECKING:
    from vllm_budgetkv.policy.base import Observation
    from vllm_budgetkv.policy.options import PolicyOptions


class FullPolicy(Policy):
    """The baseline without compression: a request that does not fit its quota is refused."""

    name: ClassVar[str] = "full"
    needs_scores: ClassVar[bool] = False
    compresses: ClassVar[bool] = False

    def __init__(self, options: PolicyOptions, page_tokens: int) -> None:
        pass

    def retain(self, observation: Observation) -> NoReturn:
        """Never asked, because `compresses` is False.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"policy 'full' was asked to drop some of {observation.seen_tokens} tokens; "
            "check `compresses` before calling `retain`"
        )
