"""What the user asked for: one frozen dataclass of the plugin's options and the policies'."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, replace
from typing import Any

from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.policy import POLICIES
from vllm_budgetkv.policy.option import (
    COUNT,
    POSITIVE_SHARE,
    about,
    flag_of,
    option,
    refuse_foreign,
)
from vllm_budgetkv.policy.options import PolicyFlags, PolicyOptions
from vllm_budgetkv.policy.probe_source import ChatTemplate

SECTION = "budgetkv"
LOOKAHEAD_SOURCES = ("question", "text", "template")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig(PolicyFlags):
    """Options of the plugin, and those of the policies that have a flag.

    Flags are `--kv-` and the field's name with dashes.

    Raises:
        ValueError: an option is out of range, unknown or contradicts another.
    """

    policy: str = option(
        "full",
        "Which cached tokens a request keeps once its quota is full: 'hybrid' (by the class of "
        "each attention head), 'window' (first and most recent tokens), 'full' (everything, "
        "no quota), or a method of the literature to compare with.",
        choices=tuple(POLICIES),
    )
    page_quota: int | None = option(
        None,
        "KV cache blocks that one request may hold at any instant.",
        metavar="BLOCKS",
        within=COUNT,
    )
    quota_tokens: int | None = option(
        None,
        "The quota in tokens per head instead of blocks, rounded down to blocks.",
        metavar="TOKENS",
        within=COUNT,
    )
    quota_ratio: float | None = option(
        None,
        "The quota as a share of --max-model-len instead of blocks; with 'auto' for that, of the "
        "longest that the model allows.",
        metavar="RATIO",
        within=POSITIVE_SHARE,
    )
    max_page_quota: int | None = option(
        None,
        "Most blocks that a request may ask for (kv_page_quota); without it no more than all get.",
        metavar="BLOCKS",
        within=COUNT,
    )
    request_policies: str | None = option(
        None,
        "Policies that a request may ask for (kv_policy) beside --kv-policy, as 'full,window'. "
        "Page tables are then as long as the longest needs: with 'full' as --max-model-len.",
        metavar="NAMES",
    )
    chunk_tokens: int = option(
        1024,
        "Most prompt tokens of one request in one step. A prompt that does not fit the quota is "
        "compressed at multiples of it, whatever else is in the batch, so "
        "--max-num-batched-tokens must have room for a chunk beside --max-num-seqs other tokens.",
        metavar="TOKENS",
        within=COUNT,
    )
    decode_interval_tokens: int = option(
        64, "Tokens that decode appends between two compactions.", metavar="TOKENS", within=COUNT
    )
    lookahead: bool = option(
        True,
        "Run the text of a long prompt ahead of it, so that the question chooses what the first "
        "chunks keep. Policies whose probe is text only.",
    )
    lookahead_tokens: int = option(
        256,
        "Most text tokens (the last of the prompt) that run ahead.",
        metavar="TOKENS",
        within=COUNT,
    )
    lookahead_source: str = option(
        "question",
        "What runs ahead: the 'question' behind the last picture or video, or all text where none "
        "stands there; all 'text' of the prompt; or the chat 'template' alone, which asks nothing "
        "(for ablations).",
        choices=LOOKAHEAD_SOURCES,
    )
    tuning: Mapping[str, Any] | None = option(
        None,
        "JSON object with knobs of the policy that have no flag of their own, such as "
        "'{\"text_share\": 0.3}' (for ablations; see docs/options.md).",
        metavar="JSON",
    )
    host_memory: str | None = option(
        None,
        "Host memory of each worker that keeps what quotas drop, as 32GiB: heads that look for "
        "single tokens bring them back while they decode.",
        metavar="SIZE",
        policies=("hybrid",),
    )
    reuse: bool = option(
        True,
        "Let a prompt begin with what an equal beginning left in --kv-host-memory, instead of "
        "computing it again. Its keys and values were computed behind another question.",
        policies=("hybrid",),
    )
    answer_report: bool = option(
        True,
        "Let each answer say what its request held, in kv_transfer_params['budgetkv'] of its body "
        "or of the RequestOutput: policy, quota, most blocks, and what its heads kept.",
    )
    report_file: str | None = option(
        None, "Append one JSON line per finished request to this file.", metavar="PATH"
    )
    trace_file: str | None = option(
        None,
        "Append one JSON line per finished request that tells how it went, for 'vllm-budgetkv "
        "inspect': blocks and head classes behind each step, the prompt's token ids, and which of "
        "them each head kept. Waits for the device after every step.",
        metavar="PATH",
    )
    unproven_device: bool = option(
        False, "Start on a kind of device where not all tests have passed: compare answers first."
    )
    check_ledger: bool = option(
        False, "Check every page table after every step and fill free pages with NaN (slow)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_foreign(self, self.policies)
        self._check_quota()
        self._check_requests()
        if self.host_memory is not None and self.host_bytes < 1:
            raise ValueError("--kv-host-memory 0 keeps nothing: leave it out")
        if len(self.policies) == 1:
            POLICIES[self.policy].check(self.policy_options(), self.lookahead)
        else:
            for name in self.policies:
                self.of_policy(name)

    def _check_requests(self) -> None:
        """What requests may ask for must be there."""
        unknown = [name for name in self.policies if name not in POLICIES]
        if unknown:
            raise ValueError(
                f"--kv-request-policies has {unknown[0]!r}: choose among {', '.join(POLICIES)}"
            )
        for name in ("max_page_quota", "request_policies"):
            if getattr(self, name) is not None and not self.compresses:
                raise ValueError(
                    f"--kv-policy {self.policy} has no quota, so that {flag_of(name)} means "
                    "nothing: remove it or choose --kv-policy hybrid"
                )
        if self.max_page_quota and self.page_quota and self.max_page_quota < self.page_quota:
            raise ValueError(
                f"--kv-max-page-quota {self.max_page_quota} is less than --kv-page-quota "
                f"{self.page_quota}, which a request gets without asking: raise it"
            )

    def _check_quota(self) -> None:
        given = [n for n in QUOTA_FIELDS if getattr(self, n) is not None]
        if self.compresses and len(given) != 1:
            flags = ", ".join(flag_of(name) for name in QUOTA_FIELDS)
            raise ValueError(
                f"--kv-policy {self.policy} needs exactly one of {flags}; got {len(given)}"
            )
        if given and not self.compresses:
            raise ValueError(
                f"--kv-policy {self.policy} has no quota: remove {flag_of(given[0])} or "
                "choose --kv-policy hybrid"
            )

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies that requests may have; the first is that of all that ask none."""
        asked = (self.request_policies or "").split(",")
        return tuple(
            dict.fromkeys([self.policy, *[name.strip() for name in asked if name.strip()]])
        )

    def of_policy(self, name: str) -> BudgetConfig:
        """The options of requests under one of `policies`, without those that it does not read.

        Raises:
            ValueError: the policy cannot serve with them.
        """
        changed: dict[str, Any] = {"policy": name, "request_policies": None}
        for item in fields(self):
            readers = about(item).policies
            if readers and name not in readers:
                changed[item.name] = item.default
        if not POLICIES[name].compresses:
            changed |= dict.fromkeys((*QUOTA_FIELDS, "max_page_quota"))
        return replace(self, **changed)

    @property
    def compresses(self) -> bool:
        return POLICIES[self.policy].compresses

    @property
    def retrieves(self) -> bool:
        """Whether decode reads only some pages of a request that was compressed."""
        return POLICIES[self.policy].retrieves and self.retrieval_ratio < 1

    @property
    def host_bytes(self) -> int:
        """Host memory that keeps what quotas drop; 0 for none."""
        return 0 if self.host_memory is None else bytes_of(self.host_memory, "--kv-host-memory")

    @property
    def looks_ahead(self) -> bool:
        policy = POLICIES[self.policy]
        return self.lookahead and policy.needs_scores and policy.probe_source.runs_ahead

    @property
    def replaces_ahead(self) -> bool:
        """Whether what ran ahead of a prompt gives way to its text, once that is read."""
        return self.looks_ahead and POLICIES[self.policy].probe_source.is_replaced

    @property
    def lookahead_limit_tokens(self) -> int:
        """Most text tokens, the last of the prompt, that run ahead."""
        asks_template = POLICIES[self.policy].probe_source is ChatTemplate
        if asks_template or self.lookahead_source == "template":
            return self.template_tokens
        return self.lookahead_tokens

    @property
    def lookahead_enough_tokens(self) -> int:
        """Text tokens behind a picture or video that keep what stands before it from running ahead.

        Behind the last one they are a question if they are more than the template and the mark that
        closes the item.
        """
        if self.lookahead_source == "question":
            return self.template_tokens + 2
        return self.lookahead_limit_tokens

    def policy_options(self) -> PolicyOptions:
        """Options of the policies: flags, then `tuning`; the others keep their default.

        Raises:
            ValueError: a knob is unknown, has a flag of its own or is out of range.
        """
        flags = {item.name: getattr(self, item.name) for item in fields(PolicyFlags)}
        knobs = {item.name for item in fields(PolicyOptions)} - flags.keys()
        tuning = self.tuning or {}
        for name in tuning:
            if name in {item.name for item in fields(self)}:
                raise ValueError(f"--kv-tuning sets {name}: set {flag_of(name)} instead")
            if name not in knobs:
                known = ", ".join(sorted(knobs))
                raise ValueError(f"--kv-tuning sets the unknown knob {name!r}; known: {known}")
        return PolicyOptions(**flags, **tuning)

    def quota_blocks(self, block_tokens: int, max_model_len: int) -> int:
        """The quota in blocks; for a policy that keeps everything, what the longest request needs.

        Raises:
            ValueError: the quota is smaller than one block.
        """
        longest_blocks = ceil_div(max_model_len, block_tokens)
        if not self.compresses:
            return longest_blocks
        if self.page_quota is not None:
            blocks = self.page_quota
        elif self.quota_tokens is not None:
            blocks = self.quota_tokens // block_tokens
        else:
            assert self.quota_ratio is not None
            blocks = int(self.quota_ratio * max_model_len) // block_tokens
        if blocks < 1:
            raise ValueError(
                f"the KV quota is smaller than one block of {block_tokens} tokens: raise "
                f"{', '.join(flag_of(name) for name in QUOTA_FIELDS if getattr(self, name))} "
                "or lower --block-size"
            )
        return min(blocks, longest_blocks)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> BudgetConfig:
        """Build from `additional_config["budgetkv"]`.

        Raises:
            ValueError: a key is unknown or a value is out of range.
        """
        known = [item.name for item in budget_options()]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(
                f"unknown {SECTION} option(s) {', '.join(unknown)}; known: {', '.join(known)}"
            )
        return cls(**options)


def section_of(additional: Mapping[str, Any]) -> Mapping[str, Any]:
    """Our options in an `additional_config`.

    Raises:
        ValueError: they are no mapping.
    """
    section = additional.get(SECTION) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{SECTION} must be a JSON object of options; got {section!r}")
    return section


def bytes_of(size: str, flag: str) -> int:
    """Bytes of a size in the user's words, as 512MiB or 32GiB.

    Raises:
        ValueError: it is no such size; the message names the flag.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?B)", size.strip())
    if found is None:
        raise ValueError(f"{flag} must be a size as 512MiB or 32GiB; got {size!r}")
    number, unit = found.groups()
    base = 1024 if "i" in unit else 1000
    return int(float(number) * base ** (1 + "KMGT".index(unit[0])))


QUOTA_FIELDS = ("page_quota", "quota_tokens", "quota_ratio")


def budget_options() -> tuple[Field[Any], ...]:
    """All options with a flag: the plugin's own, then those of the policies."""
    of_policies = fields(PolicyFlags)
    return (*fields(BudgetConfig)[len(of_policies) :], *of_policies)


def budget_args(**options: Any) -> dict[str, Any]:
    """Arguments that turn the plugin on, for `LLM(model, **budget_args(policy="hybrid", ...))`.

    Args:
        options: fields of `BudgetConfig`.

    Returns:
        `{"additional_config": {"budgetkv": {...}}}`, which every way into the engine takes.

    Raises:
        ValueError: an option is unknown or out of range.
    """
    BudgetConfig.from_mapping(options)
    return {"additional_config": {SECTION: options}}
