"""What is run: policies, quotas, lengths and tasks, by the name of a plan."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.quality.suite import SUITE, TASKS
from benchmarks.stored import AUTO, DTYPE, FP8, same_bytes_tokens
from vllm_budgetkv.policy import POLICIES

if TYPE_CHECKING:
    from collections.abc import Mapping

Input = Literal["as is", "uniform", "low-res"]

PAGE_TOKENS = 8
DECODE_INTERVAL_TOKENS = 8
LONG_TOKENS = 4096
# of the prompt: 24 tokens per head survive, and `hybrid` begins to lose answers
TIGHT_SHARE = 0.03
# examples of each task in an ablation, which compares with its own base
ABLATION_COUNT, PROBE_COUNT = 7, 12
ALL_TASKS = tuple(TASKS)
HEAD_SIZE = 32
# of a `Run`, since results are kept
LATER_FIELDS = ("cache_dtype", "dtype")
STORED_COUNT = 5
# from the root of the repository, where the runner is started
HEAD_SCORES = "benchmarks/quality/head_scores.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One engine and what it is asked.

    Args:
        name: of the line in plots and tables; the policy's unless options or input differ.
        policy: a key of `POLICIES`.
        quota_share: quota as a share of the prompt, 0 to 1; None for the full cache.
        options: further options of the plugin, see `BudgetConfig`.
        page_tokens: tokens of a block.
        length_tokens: about how long the prompts are.
        tasks: keys of `TASKS`.
        count: examples of each task.
        input: "as is", or how the videos are made to fit the quota before the engine sees them.
        oracle: what is kept is chosen by the attention of the right answer.
        lookahead_layers: layers that use the look-ahead; None for all.
        cache_dtype: what vLLM is told of how keys and values are stored.
        dtype: that the engine computes in.

    Raises:
        ValueError: policy, task or share is none of these, or a quota is missing or too much.
    """

    name: str
    policy: str
    quota_share: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    page_tokens: int = PAGE_TOKENS
    length_tokens: int = 2048
    tasks: tuple[str, ...] = ALL_TASKS
    count: int = 10
    input: Input = "as is"
    oracle: bool = False
    lookahead_layers: tuple[int, ...] | None = None
    cache_dtype: str = AUTO
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy {self.policy!r} is none of {', '.join(POLICIES)}")
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown:
            raise ValueError(f"unknown task(s) {', '.join(unknown)}; known: {', '.join(TASKS)}")
        if POLICIES[self.policy].compresses != (self.quota_share is not None):
            raise ValueError(f"policy {self.policy!r} with quota_share {self.quota_share}")
        if self.quota_share is not None and not 0 < self.quota_share <= 1:
            raise ValueError(f"quota_share must be above 0 and at most 1; got {self.quota_share}")

    @property
    def title(self) -> str:
        """Name, quota, length and what is stored, for progress and errors."""
        share = "" if self.quota_share is None else f" at {100 * self.quota_share:g} %"
        stored = "" if self.cache_dtype == AUTO else f", {self.cache_dtype}"
        return f"{self.name}{share} of {self.length_tokens:,} tokens{stored}"

    @property
    def quota_tokens(self) -> int | None:
        """Tokens per head of the quota, whole pages; None for the full cache."""
        if self.quota_share is None:
            return None
        return int(self.quota_share * self.length_tokens) // self.page_tokens * self.page_tokens

    @property
    def chunk_tokens(self) -> int:
        """Small beside the quota, of which a chunk takes its tokens over the layers."""
        return 128 if self.length_tokens >= LONG_TOKENS else 64

    @property
    def num_examples(self) -> int:
        return self.count * len(self.tasks)

    def budget(self) -> dict[str, Any]:
        """Options of the plugin."""
        options: dict[str, Any] = {"policy": self.policy}
        if self.quota_share is not None:
            options |= {
                "quota_tokens": self.quota_tokens,
                "chunk_tokens": self.chunk_tokens,
                "decode_interval_tokens": DECODE_INTERVAL_TOKENS,
            }
        return options | dict(self.options)

    def key(self, fingerprint: str) -> str:
        """Name of the result: equal only for the same run of the same model and suite."""
        run = asdict(self)
        for name in LATER_FIELDS:
            # results that were kept before there was a choice
            if run[name] == Run.__dataclass_fields__[name].default:
                del run[name]
        parts = {"run": run, "model": fingerprint, "suite": SUITE}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# what the full cache of the lab's model answers; the other tasks would only cost time
SOLVED_TASKS = (
    "needle",
    "distractors",
    "page",
    "first",
    "order",
    "change",
    "note",
    "ahead",
    "second",
    "detail",
    "whole",
)

FULL = Run(name="full", policy="full")
HYBRID = Run(name="hybrid", policy="hybrid", quota_share=0.1, tasks=SOLVED_TASKS)
# bases of what is varied
SHORT = replace(HYBRID, count=ABLATION_COUNT)
TIGHT = replace(SHORT, quota_share=TIGHT_SHARE)
SOLVED_FULL = replace(FULL, tasks=SOLVED_TASKS)


def method(name: str, policy: str, **fields: Any) -> Run:
    """A baseline at a tenth."""
    return replace(HYBRID, name=name, policy=policy, **fields)


METHODS = (
    HYBRID,
    method("window", "window"),
    method("random", "random"),
    method("snapkv", "snapkv"),
    method("ada-snapkv", "ada-snapkv"),
    method("pyramidkv", "pyramidkv"),
    method("sparsemm", "sparsemm", options={"head_scores_file": HEAD_SCORES}),
    method("keydiff", "keydiff"),
    method("infinipot-v", "infinipot-v"),
    method("cords", "cords"),
    method("streammem", "streammem"),
    method("lookm", "lookm"),
    method("lookm-average", "lookm-average"),
    method("lookm-pivot", "lookm-pivot"),
    method("lookm-weighted", "lookm-weighted"),
    method("uniform frames", "window", input="uniform"),
    method("low resolution", "window", input="low-res"),
)


def at(run: Run, shares: tuple[float, ...], **changes: Any) -> list[Run]:
    """A run at other quotas."""
    return [replace(run, quota_share=share, **changes) for share in shares]


def ablation(name: str, **options: Any) -> Run:
    """`hybrid` with other options, where it has just begun to lose answers."""
    return replace(TIGHT, name=name, options=options)


def engine_variation(name: str, page_tokens: int = PAGE_TOKENS, **options: Any) -> Run:
    """`hybrid` at a tenth in another engine; less would leave no budget beside a large chunk."""
    return replace(SHORT, name=name, page_tokens=page_tokens, options=options)


def unit_of(tokens: int) -> dict[str, int]:
    return {"dynamic_unit_tokens": tokens}


def heard_in(name: str, *layers: int) -> Run:
    """`hybrid` whose look-ahead only some layers use."""
    return replace(ablation(f"look-ahead in {name}"), lookahead_layers=layers)


def by_length() -> list[Run]:
    """Four policies at three lengths, on the tasks of retrieval, for the maps of depth."""
    compared = [FULL, *(run for run in METHODS if run.name in ("hybrid", "window", "snapkv"))]
    return [
        replace(run, length_tokens=length, tasks=SOLVED_TASKS)
        for length in (1024, 2048, 4096)
        for run in compared
    ]


VARIATIONS = (
    # the probe
    ablation("no look-ahead", lookahead=False),
    ablation("look-ahead of the template", lookahead_source="template"),
    replace(ablation("the true question (oracle)"), oracle=True),
    *(ablation(f"probe of {n} tokens", probe_tokens=n) for n in (4, 8, 16, 64)),
    ablation("look-ahead of 16 tokens", lookahead_tokens=16),
    heard_in("the first half of the layers", 0, 1),
    heard_in("the second half of the layers", 2, 3),
    heard_in("the first layer", 0),
    heard_in("the second layer", 1),
    # classes and budgets
    ablation("all heads static", force_class="static"),
    ablation("all heads dynamic", force_class="dynamic"),
    *(ablation(f"threshold {x}", static_threshold=x) for x in (0.7, 0.99)),
    ablation("top-k of 16 at least", tuning={"top_k_min": 16}),
    ablation("type level", tuning={"dynamic_weight": 1.5}),
    ablation("head level", tuning={"floor_ratio": 0.2}),
    ablation("head and type level", tuning={"floor_ratio": 0.2, "dynamic_weight": 1.5}),
    # what stays
    *(ablation(f"text share {x}", tuning={"text_share": x}) for x in (0.0, 0.5, 1.0)),
    *(ablation(f"reach of {n}", tuning={"reach_tokens": n}) for n in (0, 1, 2)),
    *(ablation(f"window of {n}", window_tokens=n) for n in (0, 2)),
    ablation("cut frames not protected", tuning={"frame_share": 0.0}),
    ablation("merge values", merge="value"),
    *(
        ablation(f"dynamic heads in units of {n}", force_class="dynamic", tuning=unit_of(n))
        for n in (4, 8)
    ),
)
PROBES = (
    HYBRID,
    *(ablation(f"probe of {n} tokens", probe_tokens=n) for n in (4, 8, 16)),
    *(ablation(f"look-ahead of {n} tokens", lookahead_tokens=n) for n in (8, 16)),
    ablation("look-ahead of all text", lookahead_source="text"),
)
ENGINE_VARIATIONS = (
    *(engine_variation(f"chunks of {n}", chunk_tokens=n) for n in (32, 128, 256)),
    *(engine_variation(f"pages of {n}", page_tokens=n) for n in (16, 32)),
    *(engine_variation(f"retrieve {x:.0%} of pages", retrieval_ratio=x) for x in (0.2, 1.0)),
)

# what was dropped comes back
RECALL = replace(HYBRID, name="hybrid with recall", options={"host_memory": "256MiB"})

# order has 80 % with the full cache at this length
QUICK_TASKS = tuple(task for task in SOLVED_TASKS if task != "order")
QUICK = {"length_tokens": 1024, "tasks": QUICK_TASKS, "count": 10}


def stored() -> list[Run]:
    """The full cache and `hybrid`, in the model's own dtype and in 8 bits, tokens alike; and in 8
    bits with the bytes of the others."""
    fields: dict[str, Any] = {"dtype": DTYPE, "count": STORED_COUNT}
    small = at(HYBRID, (0.05, 0.1), **fields)
    alike = [replace(SOLVED_FULL, **fields), *small]
    in_8_bits = list(alike)
    for run in small:
        assert run.quota_tokens is not None
        tokens = same_bytes_tokens(run.quota_tokens, PAGE_TOKENS, HEAD_SIZE)
        in_8_bits.append(replace(run, quota_share=tokens / run.length_tokens))
    return [*alike, *(replace(run, cache_dtype=FP8) for run in in_8_bits)]


PLANS: dict[str, list[Run]] = {
    "main": [FULL, *(run for method in METHODS for run in at(method, (0.05, 0.1, 0.2)))],
    "lengths": by_length(),
    "budgets": [
        SOLVED_FULL,
        *at(HYBRID, (0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)),
    ],
    "ablations": [replace(SOLVED_FULL, count=ABLATION_COUNT), TIGHT, *VARIATIONS],
    "probe": [
        replace(SOLVED_FULL, count=PROBE_COUNT),
        *(run for probe in PROBES for run in at(probe, (0.025, TIGHT_SHARE), count=PROBE_COUNT)),
    ],
    "engine": [replace(SOLVED_FULL, count=ABLATION_COUNT), SHORT, *ENGINE_VARIATIONS],
    "recall": [
        SOLVED_FULL,
        *(run for one in (HYBRID, RECALL) for run in at(one, (TIGHT_SHARE, 0.05))),
    ],
    "stored": stored(),
    "quick": [replace(FULL, **QUICK), replace(HYBRID, **QUICK)],
}
