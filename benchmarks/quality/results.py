"""What a run came to, small enough to commit, and the files that hold it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.quality.suite import DEPTHS, TASKS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.quality.lab import Outcome
    from benchmarks.quality.plan import Run


@dataclass(frozen=True)
class Share:
    """Right answers among `count`."""

    right: int
    count: int

    def __add__(self, other: Share) -> Share:
        return Share(self.right + other.right, self.count + other.count)

    @property
    def value(self) -> float:
        return self.right / self.count


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run, measured.

    Attributes:
        name, policy, quota_share, length_tokens, options, input, oracle, cache_dtype, dtype: of the
            `Run`.
        quota_blocks: blocks that each request might hold.
        peak_blocks: most blocks held, mean over the requests.
        block_bytes: of a block; 0 in results that were kept before it was.
        prompt_tokens: mean over the requests, as the engine saw them.
        answers: for each task one character an example, in order: "1" right, "0" wrong.
        static_share: per layer and KV head the share of the compressed requests in which the head
            was static; empty where nothing was compressed.
        seconds: from the start of the first engine to the last answer.
        commit: what was measured.
    """

    name: str
    policy: str
    quota_share: float | None
    length_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    input: str = "as is"
    oracle: bool = False
    cache_dtype: str = "auto"
    dtype: str = "float32"
    quota_blocks: int = 0
    peak_blocks: float = 0.0
    block_bytes: int = 0
    prompt_tokens: float = 0.0
    answers: dict[str, str] = field(default_factory=dict)
    static_share: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    commit: str = ""

    def share(self, task: str) -> Share:
        text = self.answers[task]
        return Share(text.count("1"), len(text))

    def shares_by_depth(self, tasks: Sequence[str]) -> dict[float, Share]:
        """Right answers over those of `tasks` whose evidence has a depth."""
        shares = {depth: Share(0, 0) for depth in DEPTHS}
        for task in tasks:
            if TASKS[task].has_depth:
                for index, mark in enumerate(self.answers[task]):
                    shares[DEPTHS[index % len(DEPTHS)]] += Share(int(mark), 1)
        return shares

    def pooled(self, tasks: Sequence[str]) -> Share:
        """Right answers over all examples of `tasks`."""
        return sum((self.share(task) for task in tasks), Share(0, 0))


class QuotaExceededError(RuntimeError):
    """A request held more blocks than its quota."""


def check_bound(title: str, records: Sequence[dict[str, Any]]) -> None:
    """See that no request of a run held more than its quota.

    Args:
        title: of the run, for messages.
        records: the plugin's reports of its requests.

    Raises:
        QuotaExceededError: a request held more blocks than its quota.
        ValueError: a request left no record.
    """
    if not all(records):
        missing = sum(not record for record in records)
        raise ValueError(f"{title}: {missing} of {len(records)} requests left no record")
    for record in records:
        if record["peak_blocks"] > record["quota_blocks"]:
            raise QuotaExceededError(
                f"{title}: request {record['request_id']} held {record['peak_blocks']} blocks "
                f"of a quota of {record['quota_blocks']}"
            )


def summarise(run: Run, outcomes: Sequence[Outcome], seconds: float, commit: str) -> RunResult:
    """The result of a run.

    Args:
        run: what was asked.
        outcomes: of its examples, task by task.
        seconds: of asking.
        commit: what was measured.

    Raises:
        QuotaExceededError: a request held more blocks than its quota.
        ValueError: a request under a quota left no record.
    """
    records = [outcome.record for outcome in outcomes]
    check_bound(run.title, records)
    by_task = {task: [o for o in outcomes if o.task == task] for task in run.tasks}
    return RunResult(
        name=run.name,
        policy=run.policy,
        quota_share=run.quota_share,
        length_tokens=run.length_tokens,
        options=dict(run.options),
        input=run.input,
        oracle=run.oracle,
        cache_dtype=run.cache_dtype,
        dtype=run.dtype,
        quota_blocks=max(record["quota_blocks"] for record in records),
        peak_blocks=_mean([record["peak_blocks"] for record in records]),
        block_bytes=max(record["block_bytes"] for record in records),
        prompt_tokens=_mean([outcome.prompt_tokens for outcome in outcomes]),
        answers={
            task: "".join("01"[found.right] for found in group) for task, group in by_task.items()
        },
        static_share=_static_share(records),
        seconds=round(seconds, 1),
        commit=commit,
    )


def _mean(values: list[int]) -> float:
    return round(float(np.mean(values)), 1)


def _static_share(records: Sequence[dict[str, Any]]) -> list[list[float]]:
    maps = [record["static_heads"] for record in records if record["compressions"]]
    return np.mean(np.array(maps, dtype=float), axis=0).round(3).tolist() if maps else []


def save_plan(file: Path, about: dict[str, Any], results: Sequence[RunResult]) -> None:
    """One line a run, so that a change of one run is a change of one line."""
    runs = ",\n".join(f"  {json.dumps(asdict(result))}" for result in results)
    head = json.dumps(about, indent=1)
    file.write_text(f'{{\n"about": {head},\n"runs": [\n{runs}\n]\n}}\n', encoding="utf-8")


def load_plan(file: Path) -> tuple[dict[str, Any], list[RunResult]]:
    """What `save_plan` wrote.

    Raises:
        FileNotFoundError: the plan has not been run.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    return content["about"], [RunResult(**run) for run in content["runs"]]
