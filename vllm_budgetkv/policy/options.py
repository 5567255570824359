"""Every option of the policies, once: default, meaning, unit and range.

An option of an ordinary user is a field of `PolicyFlags` and has a flag of its own; one of an
ablation is a field of `PolicyOptions`, a knob of `--kv-tuning`. What goes beyond the range of one
option is for `Policy.check` of the policy that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

from vllm_budgetkv.policy.option import (
    COUNT,
    NOT_NEGATIVE,
    ODD,
    POSITIVE_SHARE,
    QUERIES,
    SHARE,
    WEIGHT,
    check_options,
    knob,
    option,
)

HeadClass = Literal["static", "dynamic"]
Rereading = Literal["none", "question", "all"]
HybridMerge = Literal["none", "value"]


@dataclass(frozen=True, kw_only=True)
class PolicyFlags:
    """Options of the policies that have a flag; `BudgetConfig` inherits them.

    Raises:
        ValueError: a value has the wrong type or is outside its range.
    """

    template_tokens: int = option(
        5,
        "Last tokens of every prompt that belong to the chat template alone and ask nothing; 5 are "
        "those of Qwen.",
        metavar="TOKENS",
        within=COUNT,
    )
    probe_tokens: int = option(
        32, "Queries per layer that score the cache.", metavar="TOKENS", within=QUERIES
    )
    sink_tokens: int = option(
        4,
        "First tokens of a request that always stay (StreamingLLM), up to a quarter of the budget.",
        metavar="TOKENS",
        within=NOT_NEGATIVE,
    )
    window_tokens: int = option(
        64,
        "Most recent tokens that always stay, up to a quarter of the budget.",
        metavar="TOKENS",
        within=NOT_NEGATIVE,
    )
    static_threshold: float = option(
        0.9,
        "A head is static when the probe's top-k attention mass is at least this, 0 to 1 "
        "(HybridKV).",
        metavar="MASS",
        within=SHARE,
    )
    retrieval_ratio: float = option(
        0.4,
        "Share of its pages that a dynamic head reads in a decode step, above 0 to 1; 1 reads all.",
        metavar="RATIO",
        within=POSITIVE_SHARE,
    )
    force_class: HeadClass | None = option(
        None, "Treat every head as of this class (for ablations).", choices=get_args(HeadClass)
    )
    # off: it changes what is cached and has not won yet
    merge: HybridMerge = option(
        "none",
        "Merge the 'value' of dropped tokens into kept ones of like keys, or 'none' (for "
        "ablations).",
        choices=get_args(HybridMerge),
        policies=("hybrid",),
    )
    recall_prefill: Rereading = option(
        "question",
        "Chunks of a prompt that attend to all tokens in front of them, which --kv-host-memory "
        "keeps, not only to those that stayed: the tokens of the question, behind the last picture "
        "or the last --kv-lookahead-tokens of text, or `all`, so that keys and values are those of "
        "the full cache and reading a prompt takes as long as with it.",
        choices=get_args(Rereading),
        policies=("hybrid",),
    )
    head_scores_file: str | None = option(
        None,
        "JSON file with offline scores of the heads, a list per layer with a number, 0 or more, "
        "per KV head. Read by policy 'sparsemm', which needs it.",
        metavar="PATH",
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(PolicyFlags):
    """All options of the policies: those with a flag and the knobs of `--kv-tuning`.

    A policy reads those that it knows.
    """

    frame_share: float = knob(
        0.5,
        "Share of the average budget that a frame cut by the chunk's end may pin.",
        metavar="SHARE",
        within=SHARE,
    )
    hysteresis: float = knob(
        0.05,
        "How far beyond the threshold a head must go before it changes class.",
        metavar="MASS",
        within=SHARE,
    )
    dynamic_weight: float = knob(
        1.0,
        "Budget of a dynamic head relative to `static_weight`. Equal: on a pretrained model it is "
        "sharp, static heads that miss what they drop.",
        metavar="WEIGHT",
        within=WEIGHT,
    )
    static_weight: float = knob(
        1.0,
        "Budget of a static head relative to `dynamic_weight`.",
        metavar="WEIGHT",
        within=WEIGHT,
    )
    floor_ratio: float = knob(
        1.0,
        "Share of the static budget in `hybrid` that is split evenly; the rest follows the scores.",
        metavar="SHARE",
        within=SHARE,
    )
    ada_floor_ratio: float = knob(
        0.2, "The same for `ada-snapkv` (Ada-KV).", metavar="SHARE", within=SHARE
    )
    text_share: float = knob(
        0.1,
        "Share of a static head's budget, less its pinned tokens, that text may take before "
        "vision: enough for instructions, too little for the marks between many pictures.",
        metavar="SHARE",
        within=SHARE,
    )
    pool_width_tokens: int = knob(
        7,
        "Width of the baselines' max-pool over the attention; 1 switches it off.",
        metavar="TOKENS",
        within=ODD,
    )
    reach_tokens: int = knob(
        8,
        "Tokens on either side of an attended one to which `hybrid` lends its attention: a "
        "question's words attend to those that it repeats, and the answer stands beside them. At "
        "most a sixteenth of the budget, and never from text to vision or back; the frames of a "
        "video are one run.",
        metavar="TOKENS",
        within=NOT_NEGATIVE,
    )
    takes_largest: bool = knob(
        True,
        "Let `hybrid` score a token by the largest attention over the probe's queries, not by the "
        "mean: one word of a question points at what it asks for, the others dilute it.",
    )
    unlike_share: float = knob(
        0.25,
        "Share of a head's budget in `hybrid`, less its pins and the text before vision, for "
        "tokens whose keys are unlike the others (KeyDiff), whatever the question looks at: the "
        "later tokens of an answer look up what no token of the question asks for.",
        metavar="SHARE",
        within=SHARE,
    )
    top_k_min: int = knob(64, "Least k of the top-k mass.", metavar="TOKENS", within=COUNT)
    top_k_ratio: float = knob(
        0.1,
        "k of the top-k mass as a share of the tokens held, if that is more than `top_k_min`.",
        metavar="RATIO",
        within=POSITIVE_SHARE,
    )
    dynamic_unit_tokens: int = knob(
        1,
        "Unit in which dynamic heads keep tokens: 1, or a divisor of the page. Whole pages lose "
        "small details: 0.18 where single tokens scored 1.00 on a prototype with frames of 4 "
        "tokens.",
        metavar="TOKENS",
        within=COUNT,
    )
    recent_frames_share: float = knob(
        0.25,
        "Share of a head's budget for the most recent frames (InfiniPot-V).",
        metavar="SHARE",
        within=SHARE,
    )
    redundancy_share: float = knob(
        0.5,
        "Share of the scored tokens that stay because recent frames do not repeat them; the others "
        "stay for the norm of their value (InfiniPot-V).",
        metavar="SHARE",
        within=SHARE,
    )
    coverage_value_share: float = knob(
        0.5,
        "Weight of a token's value against its key in `cords`; a guess.",
        metavar="SHARE",
        within=SHARE,
    )
    diversity_share: float = knob(
        0.5,
        "Weight of new directions against coverage in `cords`; a guess.",
        metavar="SHARE",
        within=SHARE,
    )
    recall_heads_share: float = knob(
        1 / 3,
        "Share of the heads, the most concentrated ones, that bring tokens back from "
        "--kv-host-memory.",
        metavar="SHARE",
        within=POSITIVE_SHARE,
    )
    recall_share: float = knob(
        0.5,
        "Tokens that such a head brings back in a step, as a share of the budget beside the index.",
        metavar="SHARE",
        within=POSITIVE_SHARE,
    )
    second_look: bool = knob(
        False,
        "Choose anew what stays of a prompt that --kv-host-memory keeps, once it has been read: "
        "the question where it stands asks all of it, not the one that ran ahead. With "
        "--kv-recall-prefill 'question' or 'all' that is so in any case.",
    )
    recall_index_share: float = knob(
        0.5,
        "Most of the budget that the index of the prompt may take. An entry speaks for one token, "
        "or for 2, 4 or 8 neighbours where it would take more; a prompt that is too long even so "
        "is served without recall.",
        metavar="SHARE",
        within=POSITIVE_SHARE,
    )
    uniform_share: float = knob(
        0.1,
        "Share of the budget that all heads get alike; the rest follows their offline scores "
        "(SparseMM).",
        metavar="SHARE",
        within=SHARE,
    )
    seed: int = knob(0, "Seed of random ranks.")

    def top_k_tokens(self, held_tokens: int) -> int:
        """k of the top-k mass for heads that hold at most `held_tokens`."""
        return max(self.top_k_min, ceil(self.top_k_ratio * held_tokens))

    def retrieval_sink_pages(self, page_tokens: int) -> int:
        """First pages of a dynamic head that decode always reads: those that hold its sinks."""
        return ceil(self.sink_tokens / page_tokens)

    def retrieval_window_pages(self, page_tokens: int) -> int:
        """Last pages of a dynamic head that decode always reads.

        The last page is partly filled, so a window of whole pages touches one page more.
        """
        return ceil(self.window_tokens / page_tokens) + 1
