"""The pools and the requests of `benchmarks.bench_load`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

QUESTION_TOKENS = 64
IMAGE_PIXELS, MIDDLE_IMAGES, IMAGE_SPREAD = 448, 24, 1 / 3
FRAME_PIXELS, FRAME_TOKENS = 224, 32
BURST_PROMPTS, BURST_PROMPT_TOKENS = 12, 4096
SHORT_TOKENS, LONG_TOKENS = 32, 256
LONGEST_TOKENS = 16384
# 256 tokens each, so prompts of 4,096 to 8,192 tokens
MOST_IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Memory that both sides get, and what is served from it.

    Args:
        requests: that stock vLLM holds at once, of the longest prompt and answer.
        longest_tokens: of one request, prompt and answer; also `--max-model-len`.
        quota_tokens: of a request of ours.
    """

    requests: int
    longest_tokens: int
    quota_tokens: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """Requests of one `vllm bench serve`.

    Args:
        about: what the table calls it.
        pool: name of its pool.
        prompts: requests in all.
        concurrency: that are sent at once, at most.
        output_tokens: of each answer.
        dataset: arguments that name the prompts.
        is_chat: whether the chat API takes it, as pictures and videos must be.
        media: per-request `media_io_kwargs`, as JSON.
        sides: that serve it.
    """

    about: str
    pool: str
    prompts: int
    concurrency: int
    output_tokens: int
    dataset: tuple[str, ...]
    is_chat: bool = False
    media: str | None = None
    sides: tuple[str, ...] = ("stock", "ours")


# a quota of a tenth of the longest prompt, as in `benchmarks.bench`, where prompts differ in length
POOLS = {
    "two": Pool(requests=2, longest_tokens=BURST_PROMPT_TOKENS + LONG_TOKENS, quota_tokens=640),
    "all": Pool(
        requests=BURST_PROMPTS, longest_tokens=BURST_PROMPT_TOKENS + LONG_TOKENS, quota_tokens=640
    ),
    "long": Pool(requests=2, longest_tokens=LONGEST_TOKENS + LONG_TOKENS, quota_tokens=1600),
}


def text(prompt_tokens: int, spread: float = 0.0) -> tuple[str, ...]:
    """Random words, `prompt_tokens` times 1 - spread to 1 + spread."""
    return (
        *("--dataset-name", "random", "--random-input-len", str(prompt_tokens)),
        *("--random-range-ratio", json.dumps({"input": spread, "output": 0.0})),
    )


def random_mm(sizes: dict[tuple[int, int, int], float], items: int, spread: float) -> list[str]:
    """Noise in sizes of (height, width, frames), each with its share, and a short question."""
    buckets = ", ".join(f"{size}: {share}" for size, share in sizes.items())
    return [
        *("--dataset-name", "random-mm", "--random-input-len", str(QUESTION_TOKENS)),
        *("--random-mm-bucket-config", f"{{{buckets}}}"),
        *("--random-mm-base-items-per-request", str(items)),
        *("--random-mm-num-mm-items-range-ratio", str(spread)),
        *("--random-mm-limit-mm-per-prompt", json.dumps({"image": MOST_IMAGES, "video": 1})),
    ]


def _long(concurrency: int, prompts: int, output_tokens: int) -> Case:
    middle_tokens, spread = (BURST_PROMPT_TOKENS + LONGEST_TOKENS) // 2, 0.6
    return Case(
        about=f"4K-16K words, {concurrency} at once, {output_tokens} out",
        pool="long",
        prompts=prompts,
        concurrency=concurrency,
        output_tokens=output_tokens,
        dataset=text(middle_tokens, spread),
    )


def _burst(pool: str, output_tokens: int) -> Case:
    room = "two" if pool == "two" else "all of them"
    return Case(
        about=f"12 of 4,096 words at once, pool of {room}, {output_tokens} out",
        pool=pool,
        prompts=BURST_PROMPTS,
        concurrency=BURST_PROMPTS,
        output_tokens=output_tokens,
        dataset=text(BURST_PROMPT_TOKENS),
    )


def _cases() -> dict[str, Case]:
    images = Case(
        about="16 to 32 pictures, 8 at once, 32 out",
        pool="long",
        prompts=8,
        concurrency=8,
        output_tokens=SHORT_TOKENS,
        dataset=tuple(
            random_mm({(IMAGE_PIXELS, IMAGE_PIXELS, 1): 1.0}, MIDDLE_IMAGES, IMAGE_SPREAD)
        ),
        is_chat=True,
    )
    # 128 and 256 frames are 4,096 and 8,192 tokens
    lengths = {(FRAME_PIXELS, FRAME_PIXELS, frames): 0.5 for frames in (128, 256)}
    video = replace(
        images,
        about="a video of 128 or 256 frames, 8 at once, 32 out",
        dataset=tuple(random_mm(lengths, items=1, spread=0.0)),
    )
    # what users do instead: so many frames that the request fits what ours may hold
    room_tokens = POOLS["long"].quota_tokens - QUESTION_TOKENS - SHORT_TOKENS
    frames = room_tokens // FRAME_TOKENS // 2 * 2
    fewer = replace(
        video,
        about=f"the same videos, sampled to {frames} frames",
        media=json.dumps({"video": {"num_frames": frames}}),
        sides=("stock",),
    )
    return {
        "burst-short": _burst("two", SHORT_TOKENS),
        "burst-long": _burst("two", LONG_TOKENS),
        "all-short": _burst("all", SHORT_TOKENS),
        "all-long": _burst("all", LONG_TOKENS),
        "one-short": _long(1, 2, SHORT_TOKENS),
        "one-long": _long(1, 2, LONG_TOKENS),
        "four-short": _long(4, 6, SHORT_TOKENS),
        "four-long": _long(4, 6, LONG_TOKENS),
        "sixteen-short": _long(16, 16, SHORT_TOKENS),
        "sixteen-long": _long(16, 16, LONG_TOKENS),
        "images": images,
        "video": video,
        "video-fewer-frames": fewer,
    }


CASES = _cases()
