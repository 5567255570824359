"""What the engine core tells a front end of a request, for its metrics and for stop strings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.arithmetic.quota import Quota

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

REPORT = "budgetkv"
KEY = "budgetkv_meter"


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What a front end must know of a request to say later what it holds then.

    Args:
        quota: fields of its quota.
        prompt_tokens: of its prompt, which is all that it has computed at its first token.
    """

    quota: Mapping[str, Any]
    prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class Message:
    """It travels beside the report of an answer and never reaches a client.

    Args:
        counts: whether metrics are made of it.
        model_name, engine: labels, as those of vLLM's own metrics.
        policy: of the request.
        peak_blocks: most blocks that it held.
        full_cache_blocks: that a full cache would have held.
        evicted_tokens: of the prompt, summed over heads of one rank, by class; None if nothing was.
        retained_mass: see the report.
        compression_seconds: of the host, for its prompt.
        host_blocks: blocks of host memory now, by state; None without any.
        recalled: what the heads of one rank brought back of requests that left since the last
            message, fields of `Recalled`; None without host memory.
        grows: of a request that goes on; None of one that ended.
    """

    counts: bool
    model_name: str
    engine: str
    policy: str
    peak_blocks: int
    full_cache_blocks: int
    evicted_tokens: Mapping[str, int] | None = None
    retained_mass: float | None = None
    compression_seconds: float | None = None
    host_blocks: Mapping[str, int] | None = None
    recalled: Mapping[str, int] | None = None
    grows: Growth | None = None

    def as_params(self) -> dict[str, Any]:
        return {KEY: asdict(self)}

    @classmethod
    def take(cls, params: dict[str, Any]) -> Self | None:
        """Take the message out of what travels; None if there is none. Mutates `params`."""
        found = params.pop(KEY, None)
        if found is None:
            return None
        grows = found["grows"]
        return cls(**{**found, "grows": None if grows is None else Growth(**grows)})


class Followed:
    """A request that the front end may end, at a stop string: what is said of it then.

    Args:
        message: as it came with its first token, or with its second.
        params: what travels to its client; None for nothing. The report in it is kept up to date.
    """

    def __init__(self, message: Message, params: dict[str, Any] | None) -> None:
        assert message.grows is not None
        self._quota = Quota.of_fields(message.grows.quota)
        self._prompt_tokens = self._seen_tokens = message.grows.prompt_tokens
        self._report = (params or {}).get(REPORT)
        self.params = params
        self.message = replace(message, grows=None)

    def go_on(self, known: Followed, num_tokens: int) -> None:
        """Take over from what was known before, with the output tokens that came now."""
        self._seen_tokens = known._seen_tokens
        self.grow(num_tokens)

    def grow(self, num_tokens: int) -> None:
        """So many output tokens more have come."""
        self._seen_tokens += num_tokens
        quota, seen_tokens = self._quota, self._seen_tokens
        blocks = quota.blocks_for(seen_tokens, self._prompt_tokens)
        self.message = replace(
            self.message,
            peak_blocks=max(self.message.peak_blocks, blocks),
            full_cache_blocks=-(-seen_tokens // quota.block_tokens),
        )
        if self._report is not None:
            self._report["peak_blocks"] = self.message.peak_blocks
            self._report["full_cache_blocks"] = self.message.full_cache_blocks
            compactions = quota.compactions(seen_tokens, self._prompt_tokens)
            self._report["output_compactions"] = compactions
