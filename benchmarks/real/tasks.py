"""The text tasks: RULER's, generated from its definitions (https://arxiv.org/abs/2404.06654).

Needles in prose, variable tracking, common and frequent words, and questions about short passages.
Every example is made from a seed of its own: task, length and index, and so is the same for all
policies and peers. What differs from RULER: the prose, the words, numbers of four digits,
one form of the question, and two needles of our own, whose value stands before the key or afar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.real import prose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    Rng = np.random.Generator

SUITE = 20261125
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUM_KEYS = 4
# what a needle task says in front of its text, as in RULER
QUIZ = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)


@dataclass(frozen=True)
class Example:
    """One prompt and its answer.

    Attributes:
        task: a key of `TASKS`.
        length_tokens: about how long the prompt is.
        depth: where the evidence is, 0 (first) to 1 (last); None where it has no one place.
        content: of the user's message.
        prefix: how the assistant's answer begins.
        answers: what it has to hold; all of them, in any order.
        told: the right answer as the text that follows `prefix`.
    """

    task: str
    length_tokens: int
    depth: float | None
    content: str
    prefix: str
    answers: tuple[str, ...]
    told: str

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Text of the model's chat template, open behind the prefix of the answer."""
        message = [{"role": "user", "content": self.content}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return text + self.prefix

    def inputs(self, tokenizer: PreTrainedTokenizerBase, behind: str = "") -> Any:
        """The prompt as vLLM takes it, with more text behind it."""
        return self.prompt(tokenizer) + behind


@dataclass(frozen=True)
class Draft:
    """An example before its text is filled up to its length.

    Attributes:
        head, question: in front of and behind the text.
        needles: sentences to put into the text, in this order unless the task has a depth.
        filler: piece of a number; as many make the text as fit.
        joint: between two pieces.
        grows_to_front: whether each further piece stands in front of those before it.
    """

    head: str
    question: str
    prefix: str
    answers: tuple[str, ...]
    told: str
    needles: tuple[str, ...]
    filler: Callable[[int], str]
    joint: str = "\n"
    grows_to_front: bool = False


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        title: for tables.
        draft: from a generator of numbers.
        has_depth: whether the first needle stands at the depth of the example, the others anywhere.
    """

    title: str
    draft: Callable[[Rng], Draft]
    has_depth: bool = False


def make_examples(
    name: str, length_tokens: int, count: int, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """`count` examples of a task, all depths equally often where the task has depths."""
    task = TASKS[name]
    examples = []
    for index in range(count):
        rng = np.random.default_rng([SUITE, sum(map(ord, name)), length_tokens, index])
        depth = DEPTHS[index % len(DEPTHS)] if task.has_depth else None
        draft = task.draft(rng)
        content = draft.head + fill(draft, length_tokens, depth, rng, tokenizer) + draft.question
        examples.append(
            Example(name, length_tokens, depth, content, draft.prefix, draft.answers, draft.told)
        )
    return examples


def fill(
    draft: Draft,
    length_tokens: int,
    depth: float | None,
    rng: Rng,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """The text of a draft: its needles among as much filler as the length has room for."""

    def tokens(piece: str) -> int:
        return len(tokenizer(piece, add_special_tokens=False)["input_ids"])

    fixed = (draft.head, draft.question, draft.prefix, draft.told)
    room_tokens = length_tokens - tokens("".join(fixed)) - 40  # of the chat template
    room_tokens -= sum(tokens(draft.joint + needle) for needle in draft.needles)
    pieces: list[str] = []
    while room_tokens > 0:
        piece = draft.filler(len(pieces))
        room_tokens -= tokens(draft.joint + piece)
        if room_tokens > 0:
            pieces.insert(0 if draft.grows_to_front else len(pieces), piece)
    places = np.sort(rng.integers(len(pieces) + 1, size=len(draft.needles)))
    if depth is not None:
        places = rng.permutation(places)
        places[0] = round(depth * len(pieces))
    # from the last place to the first; of two at one place the first needle comes first
    order = sorted(range(len(places)), key=lambda index: (places[index], index), reverse=True)
    for index in order:
        pieces.insert(int(places[index]), draft.needles[index])
    return draft.joint.join(pieces)


def prose_filler(rng: Rng) -> Callable[[int], str]:
    """Paragraphs that follow each other in the book, from a random one on."""
    blocks = prose.paragraphs()
    first = int(rng.integers(len(blocks)))
    return lambda index: blocks[(first + index) % len(blocks)]


def some_words(kind: str, count: int, rng: Rng) -> list[str]:
    return rng.choice(prose.words(kind), size=count, replace=False).tolist()


def number(rng: Rng, digits: int = 4) -> str:
    """RULER has seven digits, which the model of the lab does not bring back one by one."""
    return str(int(rng.integers(10 ** (digits - 1), 10**digits)))


Needle = Callable[[str, str], str]
"""Sentence of a key and a value."""


def plain(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def reversed_needle(key: str, value: str) -> str:
    """The value stands before its key."""
    return f"It is {value} that is one of the special magic numbers for {key}."


def distant_needle(key: str, value: str) -> str:
    """Twenty words between the key and its value."""
    return (
        f"One of the special magic numbers for {key}, which the old keeper of the western gate "
        f"wrote down in his book before he went away to the sea, is: {value}."
    )


def needle_draft(
    rng: Rng, keys: int = 1, values: int = 1, asked: int = 1, needle: Needle = plain
) -> Draft:
    """Needles of `keys` keys with `values` values each, of which `asked` keys are asked for."""
    names = some_words("noun", keys, rng)
    table = {name: [number(rng) for _ in range(values)] for name in names}
    wanted = [value for name in names[:asked] for value in table[name]]
    listed = ", and ".join(filter(None, [", ".join(names[: asked - 1]), names[asked - 1]]))
    several = len(wanted) > 1
    what = (
        f"special magic number{'s' if several else ''} for {listed} mentioned in the provided text"
    )
    verb = "are" if several else "is"
    return Draft(
        head=QUIZ,
        question=f"\nWhat {verb} {'all ' if several else ''}the {what}?",
        prefix=f"The {what} {verb}",
        answers=tuple(wanted),
        told=" " + ", ".join(wanted),
        needles=tuple(needle(name, value) for name in names for value in table[name]),
        filler=prose_filler(rng),
    )


def tracking(rng: Rng) -> Draft:
    """Variables that come to one value, each from the one before."""
    names = ["".join(letters) for letters in rng.choice(list("ABCDEFGHJKLMNPQRSTUVWXYZ"), (8, 5))]
    value = number(rng)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {b} = VAR {a}" for a, b in zip(names[:3], names[1:4], strict=True)]
    return Draft(
        head="Memorize and track the chain(s) of variable assignment hidden in the following "
        "text.\n\n",
        question=f"\nQuestion: Find all variables that are assigned the value {value} in the text "
        "above.",
        prefix="Answer: According to the chain(s) of variable assignment in the text above, 4 "
        f"variables are assigned the value {value}, they are:",
        answers=tuple(names[:4]),
        told=" " + ", ".join(names[:4]),
        needles=tuple(chain),
        filler=prose_filler(rng),
    )


def common(rng: Rng) -> Draft:
    """The words of a numbered list that come back ten times as often as the others."""
    names = some_words("noun", 1500, rng)
    often, rest = names[:5], names[5:]
    drawn: list[str] = []
    for start in range(0, len(rest) - 5, 5):
        drawn += rng.permutation([*often, *rest[start : start + 5]]).tolist()
    return Draft(
        head="Below is a numbered list of words. In these words, some appear more often than "
        "others. Memorize the ones that appear most often.\n",
        question="\nQuestion: What are the 5 most common words in the above list?",
        prefix="Answer: The top 5 words that appear most often in the list are:",
        answers=tuple(often),
        told=" " + ", ".join(often),
        needles=(),
        filler=lambda index: f"{index + 1}. {drawn[index]}",
        joint=" ",
    )


def frequent(rng: Rng) -> Draft:
    """The three most frequent coded words of a text whose frequencies follow a zeta law."""
    letters = list("abcdefghijklmnopqrstuvwxyz")
    names = ["".join(rng.choice(letters, 6)) for _ in range(100)]
    weights = np.arange(1, 101, dtype=float) ** -2.0
    drawn = rng.choice(100, size=20_000, p=weights / weights.sum())
    return Draft(
        head="Read the following coded text and track the frequency of each coded word. Find the "
        "three most frequently appeared coded words.\n",
        question="\nQuestion: Do not provide any explanation. What are the three most frequently "
        "appeared words in the above coded text?",
        prefix="Answer: According to the coded text above, the three most frequently appeared "
        "words are:",
        answers=tuple(names[:3]),
        told=" " + ", ".join(names[:3]),
        needles=(),
        filler=lambda index: names[drawn[index]],
        joint=" ",
    )


def passages(rng: Rng) -> Draft:
    """A question about one of many short passages on invented people."""
    people = [
        f"{first.capitalize()} {last.capitalize()}"
        for first, last in zip(
            some_words("noun", 400, rng), some_words("noun", 400, rng), strict=True
        )
    ]
    goods, pets = some_words("noun", 400, rng), some_words("adjective", 400, rng)

    def passage(index: int) -> str:
        return (
            f"{people[index]} is a {pets[index]} person. People in the town know that "
            f"{people[index]} sells {goods[index]} at the market every morning."
        )

    asked = 399
    return Draft(
        head="Answer the question based on the given documents.\n\n",
        question=f"\nQuestion: What does {people[asked]} sell at the market?",
        prefix=f"Answer: {people[asked]} sells",
        answers=(goods[asked],),
        told=f" {goods[asked]}",
        needles=(passage(asked),),
        filler=passage,
    )


def continuation(rng: Rng) -> Draft:
    """The text goes on: what comes next, a sentence or so, given how its paragraph begins."""
    blocks = prose.paragraphs()
    long = [index for index, block in enumerate(blocks) if len(block.split()) >= 60]
    last = long[int(rng.integers(len(long)))]
    words = blocks[last].split()
    return Draft(
        head="Read this text, and then continue it.\n",
        question="",
        prefix=" ".join(words[:20]),
        answers=(" ".join(words[20:60]),),
        told=" " + " ".join(words[20:60]),
        needles=(),
        filler=lambda index: blocks[(last - 1 - index) % len(blocks)],
        grows_to_front=True,
    )


TASKS: dict[str, Task] = {
    "single": Task("single needle", needle_draft, has_depth=True),
    "multikey": Task("multi-key", lambda rng: needle_draft(rng, keys=NUM_KEYS), has_depth=True),
    "multivalue": Task("multi-value", lambda rng: needle_draft(rng, values=NUM_KEYS)),
    "multiquery": Task("multi-query", lambda rng: needle_draft(rng, keys=NUM_KEYS, asked=NUM_KEYS)),
    "reversed": Task(
        "value first", lambda rng: needle_draft(rng, needle=reversed_needle), has_depth=True
    ),
    "distant": Task(
        "value afar", lambda rng: needle_draft(rng, needle=distant_needle), has_depth=True
    ),
    "tracking": Task("variable tracking", tracking),
    "common": Task("common words", common),
    "frequent": Task("frequent words", frequent),
    "passages": Task("passages", passages, has_depth=True),
    "continuation": Task("continuation", continuation),
}


def holds_all(text: str, answers: Sequence[str]) -> bool:
    """Whether a text holds every answer, whatever stands around them."""
    return all(answer.lower() in text.lower() for answer in answers)
