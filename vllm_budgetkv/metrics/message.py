"""What the engine core tells a front end of a request that ended, for its metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

KEY = "budgetkv_meter"


@dataclass(frozen=True, kw_only=True)
class Message:
    """It travels beside the report of an answer and never reaches a client.

    Args:
        model_name, engine: labels, as those of vLLM's own metrics.
        policy: of the request.
        peak_blocks: most blocks that it held.
        full_cache_blocks: that a full cache would have held.
        evicted_tokens: of the prompt, summed over heads of one rank, by class; None if nothing was.
        retained_mass: see the report.
        compression_seconds: of the host, for its prompt.
    """

    model_name: str
    engine: str
    policy: str
    peak_blocks: int
    full_cache_blocks: int
    evicted_tokens: Mapping[str, int] | None = None
    retained_mass: float | None = None
    compression_seconds: float | None = None

    def as_params(self) -> dict[str, Any]:
        return {KEY: asdict(self)}

    @classmethod
    def take(cls, params: dict[str, Any]) -> Self | None:
        """Take the message out of what travels; None if there is none. Mutates `params`."""
        found = params.pop(KEY, None)
        return None if found is None else cls(**found)
