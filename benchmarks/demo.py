"""`make demo`: a long video through a real vLLM server whose requests hold a fixed quota of blocks.

Starts `vllm serve` on loopback, asks one question about a rendered video with the OpenAI client,
stops the server, prints what happened, draws what each class of head kept and writes the page of
`vllm-budgetkv inspect`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from openai import OpenAIError
from PIL import Image

from benchmarks import demo_report
from benchmarks.quality import reader
from benchmarks.server import Server
from vllm_budgetkv.inspection.conversation import Conversation
from vllm_budgetkv.inspection.page import render
from vllm_budgetkv.inspection.pictures import draw_kept
from vllm_budgetkv.inspection.story import read_story
from vllm_budgetkv.testing import frames
from vllm_budgetkv.testing.shapes import FRAMES_PER_TOKEN

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from openai import OpenAI

REPOSITORY = Path(__file__).parent.parent
PICTURE = REPOSITORY / "benchmarks" / "results" / "demo.png"
WORK = REPOSITORY / "build" / "demo"
PAGE = WORK / "inspect.html"

FRAME_PIXELS = (112, 112)
SIGN_EVERY_FRAMES = 6
LETTER, DIGIT = "K", "7"
QUESTION = f"{LETTER}?"
ANSWER_TOKENS = 8
REPORT_WAIT_S = 20.0


@dataclass(frozen=True)
class Answer:
    """What the client saw of one request. `cached_tokens` are those that were not computed."""

    request_id: str
    text: str
    prompt_tokens: int
    cached_tokens: int
    first_token_s: float
    total_s: float


def main() -> int:
    """Runs the demo; returns the exit status."""
    options = parse_arguments()
    model = options.model or str(reader.FOLDER)
    video = render_video(options.frames)
    WORK.mkdir(parents=True, exist_ok=True)
    report_file, trace_file = WORK / "requests.jsonl", WORK / "trace.jsonl"
    for file in (report_file, trace_file):
        file.unlink(missing_ok=True)
    print(f"starting vllm serve {model} (log: {WORK / 'server.log'})", flush=True)
    arguments = [*server_arguments(), *budget_arguments(options, report_file)]
    arguments += ["--kv-trace-file", str(trace_file)]
    try:
        with Server(model, arguments, WORK / "server.log", environment()) as server:
            print(f"asking about {options.frames} frames at {server.url}", flush=True)
            answer = ask(server.client(), video)
            record = wait_for_record(report_file, answer.request_id)
    except KeyboardInterrupt:
        print("interrupted; the server is stopped")
        return 130
    except (RuntimeError, OpenAIError) as error:
        print(f"the demo failed: {error}; see {WORK / 'server.log'}", file=sys.stderr)
        return 1
    show(trace_file, Conversation(model, {"video": [pictures(video)]}, decoder(model), answer.text))
    print(demo_report.describe(record, answer, PICTURE, PAGE))
    if answer.text.strip() != DIGIT:
        print(f"the right answer is {DIGIT}", file=sys.stderr)
        return 1
    return 0


def pictures(video: np.ndarray) -> list[Image.Image]:
    """The frames of a video, uint8 `[frames, height, width, 3]`."""
    return [Image.fromarray(frame) for frame in video]


def decoder(model: str) -> Callable[[list[int]], str]:
    """Text of the tokens of a model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda token_ids: str(tokenizer.decode(token_ids))


def show(trace_file: Path, conversation: Conversation) -> None:
    """Writes the picture and the page of the last request."""
    story = read_story(trace_file)
    assert story is not None, f"no line in {trace_file}"
    draw_kept(story, conversation, PICTURE)
    PAGE.write_text(render(story, conversation), encoding="utf-8")


def render_video(num_frames: int, shown: Mapping[str, str] | None = None) -> np.ndarray:
    """A landscape with a sign now and then.

    Args:
        num_frames: frames.
        shown: letters that stand on one sign only, each with its digit, `LETTER` by default: the
            first of them in the first third, the others evenly behind it.
    """
    shown = shown or {LETTER: DIGIT}
    rng = np.random.default_rng(0)
    others = [letter for letter in frames.LETTERS if letter not in shown]
    signs = {}
    for start in range(0, num_frames, SIGN_EVERY_FRAMES):
        pair = f"{others[rng.integers(len(others))]}{rng.integers(10)}"
        signs |= dict.fromkeys(range(start, start + FRAMES_PER_TOKEN), pair)
    for number, pair in enumerate(shown.items()):
        place = num_frames // 3 + number * num_frames * 2 // (3 * len(shown))
        start = place // SIGN_EVERY_FRAMES * SIGN_EVERY_FRAMES
        signs |= dict.fromkeys(range(start, start + FRAMES_PER_TOKEN), "".join(pair))
    return frames.render_video(num_frames, size_pixels=FRAME_PIXELS, signs=signs)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One long video under a quota of KV blocks.")
    parser.add_argument("--model", help="a model folder; the small trained reader by default")
    parser.add_argument("--frames", type=int, default=576, help="frames (default: 576)")
    parser.add_argument("--policy", default="hybrid", help="--kv-policy (default: hybrid)")
    parser.add_argument("--quota", type=int, default=28, help="blocks a request (default: 28)")
    parser.add_argument("--chunk", type=int, default=128, help="tokens a chunk (default: 128)")
    return parser.parse_args()


def server_arguments() -> list[str]:
    """What stock vLLM is told, whatever the policy."""
    return [
        *("--max-model-len", "32768"),
        *("--dtype", "float32"),
        "--enforce-eager",
        # else vLLM tries the longest video that the processor allows, for minutes
        "--skip-mm-profiling",
        # all the frames that are sent; the default takes 32 of them
        *("--media-io-kwargs", json.dumps({"video": {"num_frames": -1}})),
        *("--limit-mm-per-prompt", json.dumps({"video": 1, "image": 0})),
    ]


def budget_arguments(options: argparse.Namespace, report_file: Path) -> list[str]:
    """The flags of this plugin."""
    return [
        *("--kv-policy", options.policy),
        *("--kv-page-quota", str(options.quota)),
        *("--kv-chunk-tokens", str(options.chunk)),
        *("--kv-report-file", str(report_file)),
    ]


def environment() -> dict[str, str]:
    """The server's environment: nothing is fetched, and a CPU takes 1 GiB for its blocks."""
    return {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | (
        os.environ
    )


def ask(client: OpenAI, video: np.ndarray, question: str = QUESTION) -> Answer:
    """Sends the video and the question, streams the answer and times its first token."""
    content: list[Any] = [
        {"type": "video_url", "video_url": {"url": frames.video_data_url(video)}},
        {"type": "text", "text": question},
    ]
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content}],
        max_tokens=ANSWER_TOKENS,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, first, request_id, prompt_tokens, cached_tokens = "", None, "", 0, 0
    for event in stream:
        request_id = event.id
        if event.usage:
            prompt_tokens = event.usage.prompt_tokens
            if event.usage.prompt_tokens_details is not None:
                cached_tokens = event.usage.prompt_tokens_details.cached_tokens or 0
        if event.choices and event.choices[0].delta.content:
            first = first or time.perf_counter() - start
            text += event.choices[0].delta.content
    if first is None:
        raise RuntimeError(f"the server ended request {request_id} without a token")
    total_s = time.perf_counter() - start
    return Answer(request_id, text, prompt_tokens, cached_tokens, first, total_s)


def wait_for_record(path: Path, request_id: str) -> dict[str, Any]:
    """The line of `request_id` in the server's report file.

    Raises:
        RuntimeError: it did not come within `REPORT_WAIT_S`.
    """
    deadline = time.monotonic() + REPORT_WAIT_S
    while time.monotonic() < deadline:
        lines = path.read_text().splitlines() if path.is_file() else []
        for record in map(json.loads, lines):
            # the engine appends a suffix of its own to the client's id
            if record["request_id"].startswith(request_id):
                return record
        time.sleep(0.2)
    raise RuntimeError(f"no record of request {request_id} in {path} after {REPORT_WAIT_S:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
