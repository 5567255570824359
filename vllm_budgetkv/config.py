"""What the user asked for: one frozen dataclass, the only source of flags, help and checks."""

from __future__ import annotations

import math
from dataclasses import Field, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.policy import POLICIES
from vllm_budgetkv.policy.options import PolicyOptions
from vllm_budgetkv.quota import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping

SECTION = "budgetkv"


def _option(default: Any, help_text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **extra})


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Options of the plugin. Flags are `--kv-` and the field's name with dashes.

    Raises:
        ValueError: an option is out of range, unknown or contradicts another.
    """

    policy: str = _option(
        "full",
        "Which cached tokens a request keeps once its quota is full: 'hybrid' (by the class of "
        "each attention head), 'window' (first and most recent tokens), 'full' (everything, "
        "no quota), or a method of the literature to compare with.",
        choices=tuple(POLICIES),
    )
    page_quota: int | None = _option(
        None, "KV cache blocks that one request may hold at any instant.", metavar="BLOCKS"
    )
    quota_tokens: int | None = _option(
        None,
        "The quota in tokens per head instead of blocks, rounded down to blocks.",
        metavar="TOKENS",
    )
    quota_ratio: float | None = _option(
        None,
        "The quota as a share of --max-model-len instead of blocks, 0 to 1; with 'auto' for that, "
        "of the longest that the model allows.",
        metavar="RATIO",
    )
    chunk_tokens: int = _option(
        1024,
        "Most prompt tokens of one request in one step. A prompt that does not fit the quota is "
        "compressed at multiples of it, whatever else is in the batch, so "
        "--max-num-batched-tokens must have room for a chunk beside --max-num-seqs other tokens.",
        metavar="TOKENS",
    )
    decode_interval_tokens: int = _option(
        64, "Tokens that decode appends between two compactions.", metavar="TOKENS"
    )
    lookahead: bool = _option(
        True,
        "Run the text of a long prompt ahead of it, so that the question chooses what the first "
        "chunks keep. Policies whose probe is text only.",
    )
    lookahead_tokens: int = _option(
        256, "Most text tokens (the last of the prompt) that run ahead.", metavar="TOKENS"
    )
    lookahead_source: str = _option(
        "question",
        "What runs ahead: the 'question' behind the last picture or video, or all text where none "
        "stands there; all 'text' of the prompt; or the chat 'template' alone, which asks nothing "
        "(for ablations).",
        choices=("question", "text", "template"),
    )
    template_tokens: int = _option(
        PolicyOptions.template_tokens,
        "Last tokens of every prompt that belong to the chat template.",
        metavar="TOKENS",
    )
    probe_tokens: int = _option(
        PolicyOptions.probe_tokens, "Queries per layer that score the cache.", metavar="TOKENS"
    )
    sink_tokens: int = _option(
        PolicyOptions.sink_tokens, "First tokens of a request that always stay.", metavar="TOKENS"
    )
    window_tokens: int = _option(
        PolicyOptions.window_tokens, "Most recent tokens that always stay.", metavar="TOKENS"
    )
    static_threshold: float = _option(
        PolicyOptions.static_threshold,
        "A head is static when the probe's top-k attention mass is at least this, 0 to 1.",
        metavar="MASS",
    )
    retrieval_ratio: float = _option(
        PolicyOptions.retrieval_ratio,
        "Share of its pages that a dynamic head reads in a decode step, above 0 to 1.",
        metavar="RATIO",
    )
    force_class: str | None = _option(
        PolicyOptions.force_class,
        "Treat every head as of this class (for ablations).",
        choices=("static", "dynamic"),
    )
    merge: str = _option(
        PolicyOptions.merge,
        "Merge the 'value' of dropped tokens into kept ones of like keys, or 'none' (for "
        "ablations). Policy 'hybrid' only.",
        choices=("none", "value"),
    )
    head_scores_file: str | None = _option(
        None,
        "JSON file with offline scores of the heads, a list per layer with a number per KV head. "
        "Policy 'sparsemm' only.",
        metavar="PATH",
    )
    tuning: Mapping[str, Any] | None = _option(
        None,
        "JSON object with knobs of the policy that have no flag of their own, such as "
        "'{\"text_share\": 0.3}' (for ablations; see policy/options.py).",
        metavar="JSON",
    )
    report_file: str | None = _option(
        None, "Append one JSON line per finished request to this file.", metavar="PATH"
    )
    unproven_device: bool = _option(
        False, "Start on a kind of device on which no test has run: compare answers before use."
    )
    check_ledger: bool = _option(
        False, "Check every page table after every step and fill free pages with NaN (slow)."
    )

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(
                f"unknown --kv-policy {self.policy!r}: choose one of {', '.join(POLICIES)}"
            )
        self._check_quota()
        for name in _COUNT_FIELDS:
            _check_count(name, getattr(self, name))
        self._check_lookahead()
        if self.merge != "none" and self.policy != "hybrid":
            raise ValueError(
                f"--kv-merge {self.merge} is of --kv-policy hybrid; got --kv-policy {self.policy}"
            )
        if self.policy == "sparsemm" and self.head_scores_file is None:
            raise ValueError("--kv-policy sparsemm needs --kv-head-scores-file")
        self.policy_options()

    def _check_lookahead(self) -> None:
        if self.lookahead_source not in ("question", "text", "template"):
            raise ValueError(
                "--kv-lookahead-source must be 'question', 'text' or 'template'; got "
                f"{self.lookahead_source!r}"
            )
        if POLICIES[self.policy].probe_source == "template" and not self.lookahead:
            raise ValueError(
                f"--kv-policy {self.policy} asks with what runs ahead: remove --no-kv-lookahead"
            )

    def _check_quota(self) -> None:
        given = [n for n in _QUOTA_FIELDS if getattr(self, n) is not None]
        flags = ", ".join(flag_of(name) for name in _QUOTA_FIELDS)
        if not POLICIES[self.policy].compresses:
            if given:
                raise ValueError(
                    f"--kv-policy {self.policy} has no quota: remove {flag_of(given[0])} or "
                    "choose --kv-policy hybrid"
                )
            return
        if len(given) != 1:
            raise ValueError(
                f"--kv-policy {self.policy} needs exactly one of {flags}; got {len(given)}"
            )
        value = getattr(self, given[0])
        if given[0] == "quota_ratio":
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"--kv-quota-ratio must be a number; got {value!r}")
            if not (math.isfinite(value) and 0 < value <= 1):
                raise ValueError(f"--kv-quota-ratio must be above 0 and at most 1; got {value}")
        else:
            _check_count(given[0], value)

    @property
    def compresses(self) -> bool:
        return POLICIES[self.policy].compresses

    @property
    def retrieves(self) -> bool:
        """Whether decode reads only some pages of a request that was compressed."""
        return POLICIES[self.policy].retrieves and self.retrieval_ratio < 1

    @property
    def looks_ahead(self) -> bool:
        policy = POLICIES[self.policy]
        return self.lookahead and policy.needs_scores and policy.probe_source != "recent"

    @property
    def lookahead_limit_tokens(self) -> int:
        """Most text tokens, the last of the prompt, that run ahead."""
        sources = (self.lookahead_source, POLICIES[self.policy].probe_source)
        return self.template_tokens if "template" in sources else self.lookahead_tokens

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
        """The knobs of the policy: flags, then `tuning`; the others keep their default.

        Raises:
            ValueError: a knob is unknown, has a flag of its own or is out of range.
        """
        knobs = {f.name for f in fields(PolicyOptions)}
        shared = knobs & {f.name for f in fields(self)}
        tuning = dict(self.tuning or {})
        for name in sorted(tuning):
            if name in shared:
                raise ValueError(f"--kv-tuning sets {name}: set {flag_of(name)} instead")
            if name not in knobs:
                known = ", ".join(sorted(knobs - shared))
                raise ValueError(f"--kv-tuning sets the unknown knob {name!r}; known: {known}")
        return PolicyOptions(**{name: getattr(self, name) for name in sorted(shared)} | tuning)

    def quota_blocks(self, page_tokens: int, max_model_len: int) -> int:
        """The quota in blocks; for a policy that keeps everything, what the longest request needs.

        Raises:
            ValueError: the quota is smaller than one block.
        """
        longest_blocks = ceil_div(max_model_len, page_tokens)
        if not self.compresses:
            return longest_blocks
        if self.page_quota is not None:
            blocks = self.page_quota
        elif self.quota_tokens is not None:
            blocks = self.quota_tokens // page_tokens
        else:
            assert self.quota_ratio is not None
            blocks = int(self.quota_ratio * max_model_len) // page_tokens
        if blocks < 1:
            raise ValueError(
                f"the KV quota is smaller than one block of {page_tokens} tokens: raise "
                f"{', '.join(flag_of(name) for name in _QUOTA_FIELDS if getattr(self, name))} "
                "or lower --block-size"
            )
        return min(blocks, longest_blocks)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> BudgetConfig:
        """Build from `additional_config["budgetkv"]`.

        Raises:
            ValueError: a key is unknown or a value is out of range.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(
                f"unknown {SECTION} option(s) {', '.join(unknown)}; known: {', '.join(known)}"
            )
        return cls(**options)

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


_COUNT_FIELDS = (
    "chunk_tokens",
    "decode_interval_tokens",
    "lookahead_tokens",
    "template_tokens",
    "probe_tokens",
)
_QUOTA_FIELDS = ("page_quota", "quota_tokens", "quota_ratio")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{flag_of(name)} must be a whole number of at least 1; got {value!r}")


def flag_of(option: Field[Any] | str) -> str:
    """The command-line flag of an option, as `--kv-page-quota` of `page_quota`."""
    name = option if isinstance(option, str) else option.name
    return "--kv-" + name.replace("_", "-")


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
