"""What a request asks for itself, in `SamplingParams.extra_args`, and what it gets.

An OpenAI-compatible client sends it as `extra_body={"vllm_xargs": {"kv_page_quota": 48}}`, where
vLLM allows strings, numbers and lists. The front end refuses what cannot be served; the engine core
and the workers read the same mapping by the same rules.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.arithmetic.pinned import Pinned
from vllm_budgetkv.arithmetic.terms import Terms
from vllm_budgetkv.start.config import LOOKAHEAD_SOURCES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.start.config import BudgetConfig

PREFIX = "kv_"
# of the same prefix, but vLLM's own
FOREIGN_KEYS = ("kv_transfer_params", "kv_cache_report_mode")


def own(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a request asks of us; empty if nothing."""
    return {
        key: value
        for key, value in (extra_args or {}).items()
        if isinstance(key, str) and key.startswith(PREFIX) and key not in FOREIGN_KEYS
    }


class RequestRules:
    """Says what each request is held to. Everything of it is known at start.

    Args:
        config: the options of the server.
        quotas: of a request that asks for no other, by policy.
    """

    def __init__(self, config: BudgetConfig, quotas: Mapping[str, Quota]) -> None:
        self.config = config
        self.quotas = quotas
        self._configs = {name: config.of_policy(name) for name in config.policies}
        self.default = self.under(config.policy)

    @property
    def most_blocks(self) -> int:
        """Most blocks that a request under a quota may ask for."""
        return max(self.config.max_page_quota or 0, self.default.quota.blocks)

    def largest(self, policy: str) -> Quota:
        """The largest quota that a request of a policy may have."""
        quota = self.quotas[policy]
        return replace(quota, blocks=self.most_blocks) if quota.compresses else quota

    def of(self, asked: Mapping[str, Any] | None, prompt_tokens: int) -> Terms:
        """What a request is held to.

        Args:
            asked: its `extra_args`; keys that are not ours are left alone.
            prompt_tokens: of its prompt.

        Raises:
            ValueError: names the key, what it may be and what it is.
        """
        given = own(asked)
        if not given:
            return self.default
        unknown = [key for key in given if key not in _READERS]
        if unknown:
            raise ValueError(
                f"{unknown[0]} is nothing that a request may ask for: choose among "
                f"{', '.join(_READERS)}"
            )
        read: dict[str, Any] = {key: _READERS[key](key, value) for key, value in given.items()}
        policy, lookahead = self._policy(read), _lookahead_of(read)
        try:
            terms = self.under(policy, **lookahead)
        except ValueError as error:
            asked_for = " and ".join(f"kv_{name}" for name in lookahead)
            raise ValueError(f"{asked_for} of kv_policy {policy}: {error}") from error
        quota = self._quota(terms, read)
        if "kv_reuse" in read:
            if read["kv_reuse"] and not self.config.reuse:
                raise ValueError(
                    "kv_reuse 1 is not to be had: this server was started with --no-kv-reuse"
                )
            terms = replace(terms, reuses=read["kv_reuse"])
        if "kv_pin" in read:
            quota = self._pinning(quota, read["kv_pin"], prompt_tokens)
            terms = replace(terms, pinned=read["kv_pin"] if quota.compresses else Pinned())
        return replace(terms, quota=quota)

    def under(self, policy: str, **lookahead: Any) -> Terms:
        """What a request under a policy is held to that asks for nothing else.

        Args:
            policy: one of the server's.
            lookahead: options of that name that it sets itself.
        """
        config = self._configs[policy]
        if lookahead:
            config = replace(config, **lookahead)
        return Terms(
            policy=policy,
            quota=self.quotas[policy],
            lookahead_tokens=config.lookahead_limit_tokens if config.looks_ahead else 0,
            enough_tokens=config.lookahead_enough_tokens,
            replaces_ahead=config.replaces_ahead,
            reuses=config.reuse,
        )

    def _policy(self, read: Mapping[str, Any]) -> str:
        name = read.get("kv_policy", self.config.policy)
        if name in self.config.policies:
            return name
        raise ValueError(
            f"kv_policy must be {' or '.join(self.config.policies)} on this server, which was "
            f"started with --kv-request-policies {self.config.request_policies or '(none)'}; got "
            f"{name!r}"
        )

    def _quota(self, terms: Terms, read: Mapping[str, Any]) -> Quota:
        quota = terms.quota
        if "kv_page_quota" not in read:
            return quota
        blocks = read["kv_page_quota"]
        if not self._configs[terms.policy].compresses:
            raise ValueError(
                f"kv_page_quota means nothing for a request of kv_policy {terms.policy}, which "
                "keeps everything: leave it out"
            )
        if not quota.compresses:
            raise ValueError(
                f"kv_page_quota has no use here: the server's quota of {quota.blocks} blocks holds "
                "its longest request; start it with a smaller --kv-page-quota and with "
                "--kv-max-page-quota"
            )
        if not quota.min_blocks <= blocks <= self.most_blocks:
            raise ValueError(
                f"kv_page_quota must be from {quota.min_blocks} to {self.most_blocks} blocks of "
                f"{quota.block_tokens} tokens on this server; got {blocks}"
            )
        return replace(quota, blocks=blocks)

    def _pinning(self, quota: Quota, pinned: Pinned, prompt_tokens: int) -> Quota:
        if pinned.stop > prompt_tokens:
            raise ValueError(
                f"kv_pin ends at position {pinned.stop}, but the prompt has {prompt_tokens} tokens"
            )
        if not quota.compresses:
            return quota
        most_tokens = (quota.blocks - quota.min_blocks) * quota.block_tokens
        if pinned.num_tokens > most_tokens:
            raise ValueError(
                f"kv_pin keeps {pinned.num_tokens} tokens, at most {most_tokens} leave a quota of "
                f"{quota.blocks} blocks of {quota.block_tokens} tokens room for anything else: pin "
                f"fewer or ask for a larger kv_page_quota (at most {self.most_blocks})"
            )
        return replace(quota, pinned_tokens=pinned.num_tokens)


def _lookahead_of(read: Mapping[str, Any]) -> dict[str, Any]:
    names = {"kv_lookahead": "lookahead", "kv_lookahead_source": "lookahead_source"}
    return {name: read[key] for key, name in names.items() if key in read}


def _text(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"{key} must be a string; got {value!r}")


def _source(key: str, value: Any) -> str:
    if _text(key, value) in LOOKAHEAD_SOURCES:
        return value
    raise ValueError(f"{key} must be {' or '.join(LOOKAHEAD_SOURCES)}; got {value!r}")


def _count(key: str, value: Any) -> int:
    # JSON knows no integers: some clients write 48 as 48.0
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"{key} must be a whole number; got {value!r}")


def _flag(key: str, value: Any) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise ValueError(f"{key} must be 0 or 1; got {value!r}")


def _pinned(key: str, value: Any) -> Pinned:
    parts = value if isinstance(value, list) and value else [value]
    try:
        return Pinned.parse(",".join(_text(key, part) for part in parts))
    except ValueError as error:
        if str(error).startswith(key):
            raise
        raise ValueError(f"{key} {error}") from error


_READERS = {
    "kv_policy": _text,
    "kv_page_quota": _count,
    "kv_pin": _pinned,
    "kv_lookahead": _flag,
    "kv_lookahead_source": _source,
    "kv_reuse": _flag,
}
