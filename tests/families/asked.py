"""What a family is asked: a few short requests, and four of ten times the quota."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.families.family import Family

QUESTION = "Which letter does the sign show?"
LONG = [{"text": "What does the sign say? " * 40}]
TEXTS: list[dict[str, Any]] = [
    {"name": "short", "content": [{"text": "Which letter?"}]},
    {"name": "long", "content": LONG, "arrives": 1},
    {"name": "other", "content": [{"text": "And now? " * 40}], "arrives": 2},
    # long after the first: its keys may be there still
    {"name": "again", "content": LONG, "arrives": 30},
]
NUM_LONG = 4
LONG_OUTPUT_TOKENS = 24
# of the quota, in a prompt
TIMES = 10


def short_requests(family: Family) -> list[dict[str, Any]]:
    """Text, and what else the family reads, with the likeliest tokens of each step."""
    requests = TEXTS + (pictures(family) if family.sight else [])
    return [{**request, "logprobs": 5} for request in requests]


def pictures(family: Family) -> list[dict[str, Any]]:
    """Pictures between text, one picture in the place of another, and a video."""
    assert family.sight is not None
    side = family.sight.pixels
    first = {"image": 1, "size_pixels": [side, side]}
    content = [
        first,
        {"text": "first"},
        {"image": 2, "size_pixels": [side * 3 // 2, side]},
        {"text": "next"},
        {"image": 3, "size_pixels": [side, side]},
        {"text": QUESTION},
    ]
    if family.sight.most_pictures == 1:
        content = [first, {"text": QUESTION}]
    other = [{**first, "image": 7}, *content[1:]]
    requests = [
        {"name": "pictures", "content": content, "arrives": 1},
        {"name": "other pictures", "content": other, "arrives": 3},
    ]
    if family.sight.video:
        video = {"video": 8, "size_pixels": [side, side]}
        requests.append({"name": "video", "content": [video, {"text": QUESTION}], "arrives": 2})
    return requests


def long_requests(family: Family) -> list[dict[str, Any]]:
    """Four prompts of more than ten times the quota, and outputs that are compacted."""
    # a block of those with recurrent state is up to 256 tokens long
    is_longer = family.page_quota < 5
    sentences, beside_picture = (290, 45) if is_longer else (190, 30)
    requests = []
    for number in range(NUM_LONG):
        sentence = f"What does sign {number} say? "
        if family.sight is None:
            content: list[dict[str, Any]] = [{"text": sentence * sentences}]
        else:
            side, large_pictures = family.sight.large_pixels, family.sight.large_pictures
            if large_pictures == 1:
                beside_picture = sentences
            content = []
            for place in range(large_pictures):
                content += [
                    {"image": 10 * number + place, "size_pixels": [side, side]},
                    {"text": sentence * beside_picture},
                ]
        requests.append(
            {
                "name": f"r{number}",
                "content": [*content, {"text": QUESTION}],
                "max_tokens": LONG_OUTPUT_TOKENS,
            }
        )
    return requests
