"""What a peer did with one prompt; read and written by all environments, so nothing but Python."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Question:
    """One prompt and the answer that is forced.

    Attributes:
        task: a key of `benchmarks.real.tasks.TASKS`.
        prompt: tokens of the whole prompt.
        question_start: tokens in front of the question, which stands last.
        told: tokens of the right answer.
    """

    task: str
    prompt: list[int]
    question_start: int
    told: list[int]


@dataclass(frozen=True)
class Judged:
    """Attributes:
    first, exact: whether the first token, every token of the right answer was the likeliest.
    logprob: natural logarithm of the probability of the right answer, per token.
    peak_tokens: most tokens of keys and values in memory, mean over the layers.
    kept_tokens: those that can be attended to behind the prompt, mean over layers and heads.
    """

    task: str
    first: bool
    exact: bool
    logprob: float
    peak_tokens: float
    kept_tokens: float


def judge(
    question: Question,
    likeliest: Sequence[int],
    logprobs: Sequence[float],
    peak_tokens: float,
    kept_tokens: float,
) -> Judged:
    """Hold what a peer found likeliest, step by step, against the right answer.

    Args:
        question: what was asked.
        likeliest: tokens, one a step; a step behind the first difference says nothing.
        logprobs: of the tokens of the right answer.
    """
    assert len(logprobs) == len(question.told)
    return Judged(
        task=question.task,
        first=likeliest[0] == question.told[0],
        exact=list(likeliest[: len(question.told)]) == question.told,
        logprob=sum(logprobs) / len(logprobs),
        peak_tokens=peak_tokens,
        kept_tokens=kept_tokens,
    )


def read_job() -> dict[str, Any]:
    """The job on standard input; its questions as `Question`."""
    job = json.load(sys.stdin)
    return job | {"questions": [Question(**question) for question in job.get("questions", [])]}


def answer(rows: Sequence[dict[str, Any]]) -> None:
    """The last line of standard output; each row's `judged` as plain objects."""
    plain = [
        row | {"judged": [asdict(judged) for judged in row["judged"]]} if "judged" in row else row
        for row in rows
    ]
    sys.stdout.write("\n" + json.dumps(plain) + "\n")
