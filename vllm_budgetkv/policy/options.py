"""Every knob of the policies, with its unit and default."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

HeadClass = Literal["static", "dynamic"]
HybridMerge = Literal["none", "value"]


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """Knobs shared by all policies; a policy reads those that it knows.

    Raises:
        ValueError: a value is outside its range.
    """

    sink_tokens: int = 4
    """First tokens of the request, always kept (StreamingLLM). At most a quarter of the budget."""
    window_tokens: int = 64
    """Most recent tokens, always kept. At most a quarter of the budget."""
    frame_share: float = 0.5
    """Share of the average budget that a frame cut by the chunk's end may pin."""
    probe_tokens: int = 32
    """Queries per layer that score the cache."""
    template_tokens: int = 5
    """Last tokens of a prompt that are the chat template alone and ask nothing: of Qwen's
    `<|im_end|>\\n<|im_start|>assistant\\n`."""
    static_threshold: float = 0.9
    """A head is static if this share of its attention falls on its top-k tokens (HybridKV)."""
    hysteresis: float = 0.05
    """How far beyond the threshold a head must go before it changes class."""
    dynamic_weight: float = 1.5
    """Budget of a dynamic head relative to `static_weight`. Above it, because what a dynamic head
    drops cannot be recalled."""
    static_weight: float = 1.0
    """Budget of a static head relative to `dynamic_weight`."""
    floor_ratio: float = 0.2
    """Share of the static budget that is split evenly; the rest follows the scores (Ada-KV)."""
    text_share: float = 0.5
    """Share of a static head's budget, less its pinned tokens, that text may take before vision."""
    pool_width_tokens: int = 7
    """Width of the baselines' max-pool over the attention, odd; 1 switches it off."""
    hybrid_pool_tokens: int = 1
    """The same for `hybrid`. Off: each spurious peak would take its neighbours along. At a quota of
    5 % a whole frame was found in 33 % of the examples with 7, in 60 % with 3, in 93 % without."""
    unlike_share: float = 0.25
    """Share of a head's budget in `hybrid`, less its pins and the text before vision, for tokens
    whose keys are unlike the others (KeyDiff), whatever the question looks at: the later tokens of
    an answer look up what no token of the question asks for."""
    top_k_min: int = 64
    """Least k of the top-k mass, tokens."""
    top_k_ratio: float = 0.1
    """k of the top-k mass as a share of the tokens held, if that is more than `top_k_min`."""
    retrieval_ratio: float = 0.4
    """Share of its resident pages that a dynamic head reads in a decode step; 1 reads all."""
    dynamic_unit_tokens: int = 1
    """Unit in which dynamic heads keep tokens: 1, or a divisor of the page. Whole pages lose small
    details: 0.18 where single tokens scored 1.00 on a prototype with frames of 4 tokens."""
    recent_frames_share: float = 0.25
    """Share of a head's budget for the most recent frames (InfiniPot-V)."""
    redundancy_share: float = 0.5
    """Share of the scored tokens that stay because recent frames do not repeat them; the others
    stay for the norm of their value (InfiniPot-V)."""
    uniform_share: float = 0.1
    """Share of the budget that all heads get alike; the rest follows their offline scores
    (SparseMM)."""
    head_scores_file: str | None = None
    """JSON list with a list per layer with a number, 0 or more, per KV head (SparseMM)."""
    seed: int = 0
    """Of random ranks."""
    merge: HybridMerge = "none"
    """Whether `hybrid` merges the values of dropped tokens into kept ones of like keys. Off: it
    changes what is cached and has not won yet."""
    force_class: HeadClass | None = None
    """Class of every head, for ablations and exactness tests; None classifies."""

    def __post_init__(self) -> None:
        for name in ("sink_tokens", "window_tokens"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("probe_tokens", "template_tokens", "top_k_min", "dynamic_unit_tokens"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("dynamic_weight", "static_weight"):
            self._require(name, 0.01 <= getattr(self, name) <= 100, "from 0.01 to 100")
        for name in _FROM_0_TO_1:
            self._require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        for name in ("top_k_ratio", "retrieval_ratio"):
            self._require(name, 0 < getattr(self, name) <= 1, "above 0 and at most 1")
        for name in ("pool_width_tokens", "hybrid_pool_tokens"):
            odd = getattr(self, name) >= 1 and getattr(self, name) % 2 == 1
            self._require(name, odd, "odd and 1 or more")
        self._require("merge", self.merge in ("none", "value"), "'none' or 'value'")
        known = self.force_class in (None, "static", "dynamic")
        self._require("force_class", known, "None, 'static' or 'dynamic'")

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

    def _require(self, name: str, holds: bool, range_text: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r}; set it to a value {range_text}")


_FROM_0_TO_1 = (
    "static_threshold",
    "hysteresis",
    "floor_ratio",
    "text_share",
    "unlike_share",
    "frame_share",
    "recent_frames_share",
    "redundancy_share",
    "uniform_share",
)
