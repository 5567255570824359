"""What is run on the pretrained model: policies, quotas, lengths and tasks, by plan."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from benchmarks.real.frames import FRAME_TASKS
from benchmarks.real.tasks import SUITE, TASKS
from benchmarks.stored import AUTO, DTYPE, FP8, same_bytes_tokens
from vllm_budgetkv.policy import POLICIES

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGE_TOKENS = 16
CHUNK_TOKENS = 256
DECODE_INTERVAL_TOKENS = 16
CONTINUATION = "continuation"
# a continuation has no answer to be right
ALL_TASKS = tuple(name for name in TASKS if name != CONTINUATION)
SHARES = (0.1, 0.2, 0.5)
HEAD_SIZE = 64
# of a `Run`, since results are kept
LATER_FIELDS = ("asks_before", "cache_dtype", "dtype", "stock")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One engine and what it is asked.

    Args:
        name: of the line in tables.
        policy: a key of `POLICIES`.
        quota_share: quota as a share of the prompt, 0 to 1; None for the full cache.
        options: further options of the plugin, see `BudgetConfig`.
        length_tokens: about how long the prompts are.
        tasks: keys of `TASKS`, or of `FRAME_TASKS`.
        count: examples of each task.
        asks_before: whether another question about each text is asked first.
        cache_dtype: what vLLM is told of how keys and values are stored.
        dtype: that the engine computes in.
        stock: vLLM alone, without the plugin.

    Raises:
        ValueError: a quota is missing or too much, or vLLM alone is to compress.
    """

    name: str
    policy: str
    quota_share: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    length_tokens: int = 2048
    tasks: tuple[str, ...] = ALL_TASKS
    count: int = 5
    asks_before: bool = False
    cache_dtype: str = AUTO
    dtype: str = "float32"
    stock: bool = False

    def __post_init__(self) -> None:
        if POLICIES[self.policy].compresses != (self.quota_share is not None):
            raise ValueError(f"policy {self.policy!r} with quota_share {self.quota_share}")
        if self.stock and self.policy != "full":
            raise ValueError(f"vLLM alone has no policy {self.policy!r}")

    @property
    def title(self) -> str:
        """Name, quota, length and what is stored, for progress and errors."""
        share = "" if self.quota_share is None else f" at {100 * self.quota_share:g} %"
        stored = "" if self.cache_dtype == AUTO else f", {self.cache_dtype}"
        return f"{self.name}{share} of {self.length_tokens:,} tokens{stored}"

    @property
    def shows_frames(self) -> bool:
        """Whether it asks the model with eyes."""
        return set(self.tasks) <= FRAME_TASKS.keys()

    @property
    def num_examples(self) -> int:
        return self.count * len(self.tasks)

    def budget(self) -> dict[str, Any]:
        """Options of the plugin; none for vLLM alone."""
        if self.stock:
            return {}
        options: dict[str, Any] = {"policy": self.policy}
        if self.quota_share is not None:
            tokens = int(self.quota_share * self.length_tokens)
            options |= {
                "quota_tokens": tokens // PAGE_TOKENS * PAGE_TOKENS,
                "chunk_tokens": CHUNK_TOKENS,
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


# what the full cache answers at 2,048 tokens; the others would only cost time
SOLVED_TASKS = ("single", "reversed", "distant")

FULL = Run(name="full", policy="full", tasks=SOLVED_TASKS)


def method(name: str, policy: str, **fields: Any) -> Run:
    """A policy at a tenth."""
    return Run(name=name, policy=policy, quota_share=0.1, tasks=SOLVED_TASKS, **fields)


HYBRID = method("hybrid", "hybrid")
KEYDIFF = method("keydiff", "keydiff")
METHODS = (HYBRID, method("snapkv", "snapkv"), KEYDIFF)
WINDOW = method("window", "window")
BASELINES = (
    WINDOW,
    method("ada-snapkv", "ada-snapkv"),
    method("infinipot-v", "infinipot-v"),
    method("cords", "cords"),
    method("lookm", "lookm"),
)


def at(run: Run, shares: tuple[float, ...], **changes: Any) -> list[Run]:
    """A run at other quotas."""
    return [replace(run, quota_share=share, **changes) for share in shares]


def ablation(name: str, **options: Any) -> Run:
    """`hybrid` with other options, at a tenth."""
    return replace(HYBRID, name=name, options=options)


def tuned(name: str, **tuning: Any) -> Run:
    return ablation(name, tuning=tuning)


# what was changed for this model, taken back, and parts taken out
VARIATIONS = (
    tuned("mean over the probe", takes_largest=False),
    tuned("no reach", reach_tokens=0),
    tuned("no unlike share", unlike_share=0.0),
    tuned("budgets by class and score", floor_ratio=0.2, dynamic_weight=1.5),
    ablation("no look-ahead", lookahead=False),
)
LONG: dict[str, Any] = {"length_tokens": 4096, "tasks": ("single", "distant"), "count": 3}
LONGEST: dict[str, Any] = {"length_tokens": 7500, "tasks": ("single",), "count": 3}
NEEDLES: dict[str, Any] = {"tasks": ("single", "multikey", "multivalue")}
NEEDLES_LONG: dict[str, Any] = LONG | {"tasks": ("multikey", "multivalue")}
CONTINUED: dict[str, Any] = {"tasks": (CONTINUATION,)}
QUICK: dict[str, Any] = {"length_tokens": 1024, "tasks": ("single", "distant"), "count": 3}

# what the full cache reads on frames
FRAMES: dict[str, Any] = {"tasks": ("sign", "signs", "sign-asked"), "count": 5}
SIGNS: dict[str, Any] = FRAMES | {"tasks": FRAMES["tasks"][:2]}
FRAME_METHODS = (*METHODS, BASELINES[-1])

# what was dropped comes back
RECALL = replace(HYBRID, name="hybrid with recall", options={"host_memory": "1GiB"})


def recalling(name: str, **options: Any) -> Run:
    """Recall with other options, at a tenth."""
    tuning = {f"recall_{key}": value for key, value in options.items()}
    return replace(RECALL, name=name, options=RECALL.options | {"tuning": tuning})


def rereading(name: str, chunks: str, **fields: Any) -> Run:
    """Recall where other chunks of the prompt attend to all of it than those of the question."""
    options = RECALL.options | {"recall_prefill": chunks}
    return replace(RECALL, name=name, options=options, **fields)


NO_REREADING = rereading("no chunk attends to all", "none")
REREADING = rereading("all chunks attend to all", "all")
# host memory with room for all texts of a run
KEPT = replace(RECALL, options={"host_memory": "4GiB"})
BEHIND = replace(KEPT, name="hybrid with recall, behind another question", asks_before=True)
BEHIND_ALL = replace(
    REREADING,
    name="all chunks attend to all, behind another question",
    options=REREADING.options | KEPT.options,
    asks_before=True,
)

# a second look asks what host memory keeps with the question read where it stands
AGAIN = replace(
    RECALL, name="a second look", options=RECALL.options | {"tuning": {"second_look": True}}
)
# half of the space for an index: an entry for two tokens
COARSE = recalling("an entry for two tokens", index_share=0.1)
ALL_HEADS = recalling("all heads, an entry for two tokens", heads_share=1.0, index_share=1 / 3)

RECALL_VARIATIONS = (
    recalling("a tenth of the heads", heads_share=0.1),
    recalling("two thirds of the heads", heads_share=2 / 3),
    ALL_HEADS,
    COARSE,
    AGAIN,
    recalling("a quarter comes back", share=0.25),
    recalling("all the budget comes back", share=1.0),
)


def stored(shares: tuple[float, ...] = SHARES[:2], **fields: Any) -> list[Run]:
    """The full cache and `hybrid`, in the model's own dtype and in 8 bits, tokens alike; and in 8
    bits with the bytes of the first share."""
    alike = [replace(one, dtype=DTYPE, **fields) for one in (FULL, *at(HYBRID, shares))]
    first = alike[1]
    quota_tokens = first.budget()["quota_tokens"]
    share = same_bytes_tokens(quota_tokens, PAGE_TOKENS, HEAD_SIZE) / first.length_tokens
    in_8_bits = [*alike, replace(first, quota_share=share)]
    return [*alike, *(replace(run, cache_dtype=FP8) for run in in_8_bits)]


ALONE = replace(FULL, name="vLLM alone", stock=True, dtype=DTYPE, count=10)

PLANS: dict[str, list[Run]] = {
    "full": [replace(FULL, tasks=ALL_TASKS, length_tokens=n) for n in (1024, 2048)],
    "main": [FULL, *(run for method in METHODS for run in at(method, SHARES))],
    "baselines": [FULL, *(run for method in BASELINES for run in at(method, SHARES[:1]))],
    "long": [
        replace(FULL, **LONG),
        *at(HYBRID, SHARES, **LONG),
        *at(KEYDIFF, SHARES[:2], **LONG),
    ],
    "longest": [
        replace(FULL, **LONGEST),
        *at(HYBRID, SHARES[:2], **LONGEST),
        *at(KEYDIFF, SHARES[:1], **LONGEST),
    ],
    "perplexity": [
        replace(FULL, **CONTINUED),
        *(run for one in (HYBRID, KEYDIFF, WINDOW) for run in at(one, SHARES[:2], **CONTINUED)),
    ],
    "ablations": [FULL, HYBRID, *VARIATIONS],
    "frames-full": [replace(FULL, tasks=tuple(FRAME_TASKS), length_tokens=n) for n in (512, 2048)],
    "frames": [
        replace(FULL, **FRAMES),
        *(run for method in FRAME_METHODS for run in at(method, SHARES[:2], **FRAMES)),
    ],
    "recall": [FULL, HYBRID, *at(RECALL, (0.05, 0.1, 0.2))],
    "recall-prefill": [
        FULL,
        *(run for one in (NO_REREADING, RECALL, REREADING) for run in at(one, (0.05, 0.1))),
    ],
    # the needles of which the full cache itself answers some
    "recall-needles": [
        replace(FULL, **NEEDLES),
        *(run for one in (RECALL, REREADING) for run in at(one, (0.05, 0.1), **NEEDLES)),
    ],
    "recall-needles-long": [
        replace(FULL, **NEEDLES_LONG),
        *at(RECALL, (0.05, 0.1), **NEEDLES_LONG),
    ],
    "recall-variations": [FULL, RECALL, *RECALL_VARIATIONS],
    "recall-long": [
        replace(FULL, **LONG),
        *at(RECALL, (0.05, 0.1), **LONG),
        *at(REREADING, (0.05, 0.1), **LONG),
        *at(ALL_HEADS, SHARES[:1], **LONG),
    ],
    "reuse": [
        FULL,
        *(run for one in (KEPT, BEHIND) for run in at(one, SHARES[:2])),
        BEHIND_ALL,
    ],
    "reuse-frames": [
        replace(FULL, **FRAMES),
        *(run for one in (KEPT, BEHIND) for run in at(one, SHARES[:2], **SIGNS)),
        replace(BEHIND_ALL, **SIGNS),
    ],
    "recall-frames": [
        replace(FULL, **FRAMES),
        *(run for one in (HYBRID, RECALL, REREADING) for run in at(one, SHARES[:2], **FRAMES)),
    ],
    "stored": [
        *stored(count=10),
        *(replace(ALONE, cache_dtype=stored_in) for stored_in in (AUTO, FP8)),
    ],
    # what follows a text has no answer, so it is asked apart
    "stored-text": stored(SHARES[:1], **CONTINUED | {"count": 10}),
    "stored-frames": stored(SHARES[1:2], **SIGNS | {"length_tokens": 1024}),
    "quick": [
        replace(FULL, **QUICK),
        *at(HYBRID, (0.2,), **QUICK),
        *at(RECALL, (0.1,), **QUICK),
    ],
}

# every policy on text and on frames, what `make quality-real` measures beside the peers
CORE = ("main", "baselines", "frames", "recall")
