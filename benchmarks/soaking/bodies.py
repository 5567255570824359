"""What clients of `benchmarks.soak` send: requests of several kinds, and bodies that are wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.testing.frames import (
    image_data_url,
    render_frame,
    render_video,
    video_data_url,
)

if TYPE_CHECKING:
    import random

WORDS = ("video", "frame", "letter", "sign", "red", "the", "page", "number", "before", "after")
# a word of the small model is a few tokens, a frame of 112 x 112 pixels is 8
SHORT_WORDS, LONG_WORDS = (1, 40), (200, 900)
VIDEO_FRAMES = (24, 96, 240)
ANSWER_TOKENS = (1, 96)
PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Sent:
    """One request.

    Args:
        kind: for the count.
        path: of the API.
        body: bytes that are posted.
        expected: status codes that are right.
        streams: whether the answer comes in events.
    """

    kind: str
    path: str
    body: bytes
    expected: tuple[int, ...] = (200,)
    streams: bool = False


@dataclass
class Bodies:
    """Makes requests at random.

    Args:
        model: that the server serves.
        chance: seeded.
        videos: data URLs by frames; some of each length are rendered once, at the start.
    """

    model: str
    chance: random.Random
    videos: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for frames in VIDEO_FRAMES:
            seed = self.chance.randrange(1000)
            self.videos.append(video_data_url(render_video(frames, seed=seed)))

    def any(self) -> Sent:
        """A request of any kind; one in five is wrong or may be."""
        kinds = {"text": 5, "long text": 4, "image": 2, "video": 5, "wrong": 2, "asked": 2}
        (kind,) = self.chance.choices([*kinds], weights=[*kinds.values()])
        if kind == "wrong":
            return self._wrong()
        if kind == "asked":
            return self._asked()
        return self._right(kind)

    def _right(self, kind: str) -> Sent:
        streams = self.chance.random() < 0.6
        body = self._chat(self._content(kind)) | {"stream": streams}
        return Sent(kind, PATH, json.dumps(body).encode(), streams=streams)

    def _content(self, kind: str) -> Any:
        words = self._words(*(LONG_WORDS if kind == "long text" else SHORT_WORDS))
        if kind == "image":
            frame = render_frame(self.chance.randrange(10**6))
            media = {"type": "image_url", "image_url": {"url": image_data_url(frame)}}
        elif kind == "video":
            media = {"type": "video_url", "video_url": {"url": self.chance.choice(self.videos)}}
        else:
            return words
        return [media, {"type": "text", "text": words}]

    def _words(self, least: int, most: int) -> str:
        return " ".join(self.chance.choices(WORDS, k=self.chance.randint(least, most)))

    def _chat(self, content: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.chance.randint(*ANSWER_TOKENS),
            "temperature": self.chance.choice((0.0, 1.0)),
            "ignore_eos": True,
        }

    def _asked(self) -> Sent:
        """Terms of its own, which the server may give or refuse."""
        asked = dict(self.chance.sample([*odd_terms(self.chance)], self.chance.randint(1, 3)))
        body = self._chat(self._content("long text")) | {"vllm_xargs": asked}
        return Sent("asked", PATH, json.dumps(body).encode(), expected=(200, 400))

    def _wrong(self) -> Sent:
        """A body that no server takes."""
        chat = self._chat("Hi")
        broken_video = {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AAAA"}}
        far_too_long = " ".join(self.chance.choices(WORDS, k=20000))
        bodies: list[Any] = [
            b"{",
            b"",
            b"\x00\xff\xfe",
            b"[1, 2, 3]",
            chat | {"messages": 7},
            chat | {"messages": [{"role": "user", "content": [{"type": "nothing"}]}]},
            chat | {"messages": [{"role": "user", "content": [broken_video]}]},
            chat | {"messages": [{"role": "user", "content": far_too_long}]},
            chat | {"max_tokens": -5},
            chat | {"temperature": -1.0},
            chat | {"top_p": 7},
            chat | {"max_tokens": "many"},
            chat | {"vllm_xargs": {"kv_page_quota": 1}},
            chat | {"vllm_xargs": {"kv_pages": 4}},
            chat | {"model": "another"},
        ]
        body = self.chance.choice(bodies)
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Sent("wrong", PATH, sent, expected=(400, 404, 422))


def odd_terms(chance: random.Random) -> list[tuple[str, Any]]:
    """Names and values of `vllm_xargs`, right ones among them."""
    values = [
        *(-1, 0, 9, 12, 16, 24, 32, 33, 2**63, 10**40, 1.5, 1e308, True, None, "", "full"),
        *("hybrid", "window", "snapkv", "0:4", "0:4,6:9", "4:0", "a:b", "0:999999999", "x" * 3000),
        *([], ["0:2"], [["nested"]], {"a": 1}),
    ]
    names = ("kv_policy", "kv_page_quota", "kv_pin", "kv_lookahead", "kv_lookahead_source", "kv_")
    right = [("kv_page_quota", 16), ("kv_policy", "window"), ("kv_pin", "0:4")]
    return [*((name, chance.choice(values)) for name in names), *right]
