"""Three questions on one video, which is computed once: `python -m benchmarks.demo_questions`.

Starts `vllm serve` on loopback with a quota and host memory behind it, asks the questions one after
the other with the OpenAI client, stops the server and prints a table of what each of them took.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from openai import OpenAIError
from rich.console import Console
from rich.table import Table

from benchmarks import demo
from benchmarks.quality import reader
from benchmarks.server import Server

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.demo import Answer

# what stands on one sign of the video each, and is asked for in this order
SHOWN = {"K": "7", "M": "2", "R": "9"}


def main() -> int:
    """Runs the demo; returns the exit status."""
    options = parse_arguments()
    video = demo.render_video(options.frames, SHOWN)
    demo.WORK.mkdir(parents=True, exist_ok=True)
    report_file, log = demo.WORK / "questions.jsonl", demo.WORK / "questions.log"
    report_file.unlink(missing_ok=True)
    arguments = [
        *demo.server_arguments(),
        *demo.budget_arguments(options, report_file),
        *("--kv-host-memory", options.host_memory),
        "--enable-prompt-tokens-details",
    ]
    found = []
    print(f"starting vllm serve {options.model} (log: {log})", flush=True)
    try:
        with Server(options.model, arguments, log, demo.environment()) as server:
            client = server.client()
            for letter in SHOWN:
                print(f"asking for the digit beside {letter} at {server.url}", flush=True)
                answer = demo.ask(client, video, f"{letter}?")
                found.append((answer, demo.wait_for_record(report_file, answer.request_id)))
    except KeyboardInterrupt:
        print("interrupted; the server is stopped")
        return 130
    except (RuntimeError, OpenAIError) as error:
        print(f"the demo failed: {error}; see {log}", file=sys.stderr)
        return 1
    Console(width=None if sys.stdout.isatty() else 100).print(table(found))
    right = [answer.text.strip() for answer, _ in found] == list(SHOWN.values())
    return 0 if right else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Three questions on one video.")
    parser.add_argument("--model", default=str(reader.FOLDER), help="a model folder")
    parser.add_argument("--frames", type=int, default=576, help="frames (default: 576)")
    parser.add_argument("--quota", type=int, default=28, help="blocks a request (default: 28)")
    parser.add_argument("--chunk", type=int, default=128, help="tokens a chunk (default: 128)")
    parser.add_argument("--host-memory", default="1GiB", help="--kv-host-memory (default: 1GiB)")
    options = parser.parse_args()
    options.policy = "hybrid"
    return options


def table(found: Sequence[tuple[Answer, dict[str, Any]]]) -> Table:
    """A column for each question."""
    rows = Table(*["", *(f"{letter}?" for letter in SHOWN)])

    def row(name: str, *cells: str) -> None:
        rows.add_row(name, *cells)

    row(
        "answer, right answer",
        *(f"{a.text!r}, {digit}" for (a, _), digit in zip(found, SHOWN.values(), strict=True)),
    )
    row("prompt tokens", *(f"{a.prompt_tokens:,}" for a, _ in found))
    row("of them computed", *(f"{a.prompt_tokens - a.cached_tokens:,}" for a, _ in found))
    row("first token", *(f"{a.first_token_s:.2f} s" for a, _ in found))
    row("blocks at peak, quota", *(f"{r['peak_blocks']}, {r['quota_blocks']}" for _, r in found))
    row("full cache", *(f"{r['full_cache_blocks']} blocks" for _, r in found))
    row("in host memory", *(f"{r['host_bytes'] / 2**20:.1f} MiB" for _, r in found))
    row("recall", *(r["recall"] for _, r in found))
    row("brought back", *(f"{r['moved_bytes'] / 2**10:,.0f} KiB" for _, r in found))
    return rows


if __name__ == "__main__":
    sys.exit(main())
