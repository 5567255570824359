"""Another question about the same text: what a conversation asks before the one that counts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.real import prose
from benchmarks.real.tasks import SUITE

if TYPE_CHECKING:
    from benchmarks.real.lab import Outcome
    from benchmarks.real.tasks import Example

NUMBER_OF = "special magic number for "


def another_question(example: Example) -> Example:
    """The example with a key that its text does not have.

    Raises:
        ValueError: it asks for no special magic number, or not at its end.
    """
    text, asks, question = example.content.rpartition(NUMBER_OF)
    start, _, end = example.prefix.partition(NUMBER_OF)
    if not asks or not end:
        raise ValueError(f"{example.task}: no question that could be another")
    key = end.removesuffix(" mentioned in the provided text is")
    if not question.startswith(key) or len(question) > len(key) + 40:
        raise ValueError(f"{example.task}: the question does not stand at the end")
    rng = np.random.default_rng([SUITE, len(example.content)])
    words = [word for word in prose.words("noun") if word not in example.content]
    other = str(rng.choice(words))
    return replace(
        example,
        content=text + asks + question.replace(key, other, 1),
        prefix=start + NUMBER_OF + end.replace(key, other, 1),
    )


def require_reuse(outcomes: list[Outcome]) -> None:
    """Raise unless every prompt began behind nearly all of what was left there.

    Raises:
        ValueError: how much one took over.
    """
    for outcome in outcomes:
        reused_tokens = outcome.record["reused_tokens"]
        if reused_tokens < 0.9 * outcome.prompt_tokens:
            raise ValueError(
                f"{outcome.task}: of {outcome.prompt_tokens} tokens {reused_tokens} were there"
            )
