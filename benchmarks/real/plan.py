"""What is run on the pretrained model: policies, quotas, lengths and tasks, by plan."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from benchmarks.real.tasks import SUITE, TASKS
from vllm_budgetkv.policy import POLICIES

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGE_TOKENS = 16
CHUNK_TOKENS = 256
DECODE_INTERVAL_TOKENS = 16
ALL_TASKS = tuple(TASKS)
SHARES = (0.1, 0.2, 0.5)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One engine and what it is asked.

    Args:
        name: of the line in tables.
        policy: a key of `POLICIES`.
        quota_share: quota as a share of the prompt, 0 to 1; None for the full cache.
        options: further options of the plugin, see `BudgetConfig`.
        length_tokens: about how long the prompts are.
        tasks: keys of `TASKS`.
        count: examples of each task.

    Raises:
        ValueError: a quota is missing or too much.
    """

    name: str
    policy: str
    quota_share: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    length_tokens: int = 2048
    tasks: tuple[str, ...] = ALL_TASKS
    count: int = 10

    def __post_init__(self) -> None:
        if POLICIES[self.policy].compresses != (self.quota_share is not None):
            raise ValueError(f"policy {self.policy!r} with quota_share {self.quota_share}")

    @property
    def title(self) -> str:
        """Name, quota and length, for progress and errors."""
        share = "" if self.quota_share is None else f" at {100 * self.quota_share:g} %"
        return f"{self.name}{share} of {self.length_tokens:,} tokens"

    @property
    def num_examples(self) -> int:
        return self.count * len(self.tasks)

    def budget(self) -> dict[str, Any]:
        """Options of the plugin."""
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
        parts = {"run": asdict(self), "model": fingerprint, "suite": SUITE}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


FULL = Run(name="full", policy="full")


def method(name: str, policy: str, **fields: Any) -> Run:
    return Run(name=name, policy=policy, quota_share=0.1, **fields)


METHODS = (
    method("hybrid", "hybrid"),
    method("window", "window"),
    method("snapkv", "snapkv"),
    method("ada-snapkv", "ada-snapkv"),
    method("keydiff", "keydiff"),
    method("infinipot-v", "infinipot-v"),
    method("lookm", "lookm"),
)


def at(run: Run, shares: tuple[float, ...], **changes: Any) -> list[Run]:
    """A run at other quotas."""
    return [replace(run, quota_share=share, **changes) for share in shares]


# what the full cache answers at 2,048 tokens; the others would only cost time
SOLVED_TASKS = ("single", "multikey", "multivalue", "multiquery", "passages")
NEEDLES = ("single", "multikey")
TIGHT = Run(name="hybrid", policy="hybrid", quota_share=0.2, tasks=SOLVED_TASKS)
SOLVED_FULL = replace(FULL, tasks=SOLVED_TASKS)
LONG = {"length_tokens": 4096, "count": 5}


def ablation(name: str, **options: Any) -> Run:
    """`hybrid` with other options, at a fifth."""
    return replace(TIGHT, name=name, options=options)


VARIATIONS = (
    ablation("no look-ahead", lookahead=False),
    ablation("look-ahead of all text", lookahead_source="text"),
    ablation("all heads static", force_class="static"),
    ablation("all heads dynamic", force_class="dynamic"),
    ablation("retrieve all pages", retrieval_ratio=1.0),
    ablation("even budgets", tuning={"floor_ratio": 1.0, "dynamic_weight": 1.0}),
    *(ablation(f"pool of {n}", tuning={"hybrid_pool_tokens": n}) for n in (1, 3, 15)),
    *(ablation(f"unlike share {x}", tuning={"unlike_share": x}) for x in (0.0, 0.25, 0.75)),
    *(ablation(f"probe of {n} tokens", probe_tokens=n) for n in (8, 64)),
)

PLANS: dict[str, list[Run]] = {
    "full": [replace(FULL, length_tokens=n, count=5) for n in (1024, 2048, 4096, 7500)],
    "main": [SOLVED_FULL, *(r for m in METHODS for r in at(m, SHARES, tasks=SOLVED_TASKS))],
    "long": [
        replace(SOLVED_FULL, **LONG),
        *(
            r
            for m in METHODS
            if m.name in ("hybrid", "snapkv", "keydiff")
            for r in at(m, SHARES, tasks=SOLVED_TASKS, **LONG)
        ),
    ],
    "ablations": [SOLVED_FULL, TIGHT, *VARIATIONS],
    "quick": [
        Run(name="full", policy="full", length_tokens=1024, tasks=NEEDLES, count=5),
        Run(
            name="hybrid",
            policy="hybrid",
            quota_share=0.5,
            length_tokens=1024,
            tasks=NEEDLES,
            count=5,
        ),
    ],
}
