"""What one request is held to, in names and integers: equal in the engine core and in workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_budgetkv.arithmetic.pinned import Pinned

if TYPE_CHECKING:
    from collections.abc import Hashable

    from vllm_budgetkv.arithmetic.quota import Quota


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Of one request, or of all that ask for nothing.

    Args:
        policy: name of the policy that chooses what it keeps.
        quota: what it may hold.
        pinned: positions of its prompt that stay.
        lookahead_tokens: most text tokens, the last of the prompt, that run ahead; 0 for none.
        enough_tokens: text in front of an item does not run ahead if so many stand behind it.
        replaces_ahead: whether the prompt's last text, once read, takes the place of what ran
            ahead.
        reuses: whether its prompt may begin with what another left in host memory.
    """

    policy: str
    quota: Quota
    pinned: Pinned = Pinned()
    lookahead_tokens: int = 0
    enough_tokens: int = 0
    replaces_ahead: bool = False
    reuses: bool = True

    @property
    def kind(self) -> Hashable:
        """What keys and values behind a compressed context depend on beside the tokens."""
        return self.policy, self.quota.blocks, self.pinned

    def asks_itself(self, prompt_tokens: int, end_of_items: int) -> bool:
        """Whether a prompt that was read asks the cache with its last text alone.

        That is all that ran ahead of it, and it has seen what stands in front of it.

        Args:
            prompt_tokens: of the prompt.
            end_of_items: tokens up to the end of its last picture or video; 0 if there is none.
        """
        return self.replaces_ahead and prompt_tokens - end_of_items >= self.enough_tokens
