"""What the peers are asked, job by job, and what came of it."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.real.peers import environments
from benchmarks.real.plan import SHARES, SOLVED_TASKS
from benchmarks.real.tasks import SUITE

if TYPE_CHECKING:
    from collections.abc import Sequence

LENGTH_TOKENS = 2048
BLOCK_TOKENS = 32
POOL_BLOCKS = 128
SCORERS = ("snapkv", "keydiff", "expected", "adakv-expected")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process of one peer.

    Args:
        name: for progress and errors.
        peer: whose environment.
        options: what the process reads besides model and questions.
        count: examples of each task.
    """

    name: str
    peer: str
    options: dict[str, Any]
    count: int = 5

    @property
    def title(self) -> str:
        return self.name

    @property
    def num_examples(self) -> int:
        return self.count * len(SOLVED_TASKS)

    def key(self, fingerprint: str) -> str:
        """Name of the result: equal only for the same job of the same model, suite and pins."""
        pins = environments.requirements(self.peer).read_text(encoding="utf-8")
        parts = {"job": asdict(self), "model": fingerprint, "suite": SUITE, "pins": pins}
        parts |= {"tasks": SOLVED_TASKS, "length": LENGTH_TOKENS}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Answers:
    """What a job came to, as it is committed.

    Attributes:
        rows: one for each press and share: name, share, mode, and for each task `first` and
            `exact`, a character an example, and `logprobs`; peak and kept tokens are means.
        seconds: of the process.
        commit: what was measured.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    commit: str = ""


def jobs(count: int) -> list[Job]:
    """All of both peers; the longest first."""
    kvzip = {"presses": [], "shares": list(SHARES), "aware": False, "kvzip": True}
    scorers = kvzip | {"presses": list(SCORERS), "kvzip": False}
    found = [
        Job(name="KVzip", peer="kvpress", options=kvzip, count=count),
        Job(name="kvpress, question after", peer="kvpress", options=scorers, count=count),
        Job(
            name="kvpress, question in",
            peer="kvpress",
            options=scorers | {"aware": True},
            count=count,
        ),
        openvino("openvino", 1.0, 0, 0, count),
    ]
    for share in SHARES:
        blocks = int(share * LENGTH_TOKENS) // BLOCK_TOKENS
        limit = blocks * BLOCK_TOKENS
        found.append(openvino("openvino eviction", share, limit, 0, count))
        # a sixth of the blocks for KVCrush, where its documentation gives it a sixteenth to a third
        found.append(openvino("openvino kvcrush", share, limit, max(1, blocks // 6), count))
    return found


def openvino(name: str, share: float, limit_tokens: int, crush_blocks: int, count: int) -> Job:
    options = {
        "name": name,
        "share": share,
        "limit_tokens": limit_tokens,
        "crush_blocks": crush_blocks,
        "pool_blocks": POOL_BLOCKS,
        "aware": True,
    }
    return Job(name=f"{name} at {100 * share:g} %", peer="openvino", options=options, count=count)


def measure(job: Job, model: str, questions: Sequence[dict[str, Any]], commit: str) -> Answers:
    """Run the process of a job, one thread."""
    started = time.perf_counter()
    folder = str(environments.exported_model(model)) if job.peer == "openvino" else model
    asked = job.options | {"model": folder, "questions": list(questions)}
    python = environments.python_of(job.peer)
    rows = environments.ask_process(python, f"{job.peer}_process", asked, threads=1)
    mode = "in" if job.options["aware"] else "after"
    return Answers(
        rows=[summarise(row, mode) for row in rows],
        seconds=round(time.perf_counter() - started, 1),
        commit=commit,
    )


def summarise(row: dict[str, Any], mode: str) -> dict[str, Any]:
    """A row of a process, task by task."""
    judged = row["judged"]
    tasks = list(dict.fromkeys(entry["task"] for entry in judged))
    of_task = {task: [entry for entry in judged if entry["task"] == task] for task in tasks}
    return {
        "name": row["name"],
        "share": row["share"],
        "mode": mode,
        "peak_tokens": mean(entry["peak_tokens"] for entry in judged),
        "kept_tokens": mean(entry["kept_tokens"] for entry in judged),
        "first": {t: "".join("01"[e["first"]] for e in es) for t, es in of_task.items()},
        "exact": {t: "".join("01"[e["exact"]] for e in es) for t, es in of_task.items()},
        "logprobs": {t: [round(e["logprob"], 3) for e in es] for t, es in of_task.items()},
    }


def mean(values: Any) -> float:
    found = list(values)
    return round(sum(found) / len(found), 1)
