"""What a run on the pretrained model came to, small enough to commit."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.quality.results import Share, check_bound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from benchmarks.real.lab import Outcome
    from benchmarks.real.plan import Run


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run, measured.

    Attributes:
        name, policy, quota_share, length_tokens, options, cache_dtype, dtype: of the `Run`.
        quota_blocks: blocks that each request might hold; 0 for vLLM alone, as the next two.
        peak_blocks: most blocks held, mean over the requests.
        block_bytes: of a block; 0 in results that were kept before it was.
        prompt_tokens: mean over the requests, as the engine saw them.
        right, first, exact: for each task one character an example, in order: "1" or "0"; see
            `Outcome`.
        logprobs: for each task the log-probability of the right answer per token, an example each.
        static_share: per layer and KV head the share of the compressed requests in which the head
            was static; empty where nothing was compressed.
        seconds: from the start of the engine to the last answer.
        commit: what was measured.
    """

    name: str
    policy: str
    quota_share: float | None
    length_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    cache_dtype: str = "auto"
    dtype: str = "float32"
    quota_blocks: int = 0
    peak_blocks: float = 0.0
    block_bytes: int = 0
    prompt_tokens: float = 0.0
    right: dict[str, str] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)
    logprobs: dict[str, list[float]] = field(default_factory=dict)
    static_share: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    commit: str = ""

    def share(self, task: str) -> Share:
        return Share(self.right[task].count("1"), len(self.right[task]))

    def pooled(self, tasks: Sequence[str]) -> Share:
        """Right answers over all examples of `tasks`."""
        return sum((self.share(task) for task in tasks), Share(0, 0))

    def logprob(self, tasks: Sequence[str]) -> float:
        """Mean log-probability of a token of the right answer, each task alike."""
        return float(np.mean([np.mean(self.logprobs[task]) for task in tasks]))


def summarise(run: Run, outcomes: Sequence[Outcome], seconds: float, commit: str) -> RunResult:
    """The result of a run.

    Args:
        run: what was asked.
        outcomes: of its examples, task by task.
        seconds: of asking.
        commit: what was measured.

    Raises:
        QuotaExceededError: a request held more blocks than its quota.
        ValueError: a request left no record.
    """
    records = [] if run.stock else [outcome.record for outcome in outcomes]
    check_bound(run.title, records)

    def marks(of: Callable[[Outcome], bool]) -> dict[str, str]:
        return {t: "".join("01"[of(o)] for o in outcomes if o.task == t) for t in run.tasks}

    maps = [record["static_heads"] for record in records if record["compressions"]]
    return RunResult(
        name=run.name,
        policy=run.policy,
        quota_share=run.quota_share,
        length_tokens=run.length_tokens,
        options=dict(run.options),
        cache_dtype=run.cache_dtype,
        dtype=run.dtype,
        quota_blocks=max((record["quota_blocks"] for record in records), default=0),
        peak_blocks=round(float(np.mean([r["peak_blocks"] for r in records] or [0])), 1),
        block_bytes=max((record["block_bytes"] for record in records), default=0),
        prompt_tokens=round(float(np.mean([o.prompt_tokens for o in outcomes])), 1),
        right=marks(lambda o: o.right),
        first=marks(lambda o: o.first),
        exact=marks(lambda o: o.exact),
        logprobs={t: [round(o.logprob, 3) for o in outcomes if o.task == t] for t in run.tasks},
        static_share=np.mean(np.array(maps, float), axis=0).round(2).tolist() if maps else [],
        seconds=round(seconds, 1),
        commit=commit,
    )


def load_plan(file: Path) -> tuple[dict[str, Any], list[RunResult]]:
    """What `save_plan` of the old suite's results wrote of these."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return content["about"], [RunResult(**run) for run in content["runs"]]
