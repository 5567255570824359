"""Times transformers, plain or with a press of kvpress; in kvpress' environment, job on stdin."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.real.peers.clock import clock
from benchmarks.real.peers.judged import answer, read_job
from benchmarks.real.peers.kvpress_cache import CountingCache, decode, load
from benchmarks.real.peers.kvpress_presses import PRESSES

if TYPE_CHECKING:
    from benchmarks.real.peers.clock import Sample


def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    model = load(job["model"])
    with torch.inference_mode():
        request(model, job["warmup"], job)
        sample = request(model, job["prompt"], job)
    answer([sample.row()])


def request(model: Any, prompt: list[int], job: dict[str, Any]) -> Sample:
    """The whole prompt is compressed, its question too."""
    cache = CountingCache()
    written: list[int] = []
    press: Any = nullcontext()
    if job["press"]:
        chosen = PRESSES[job["press"]]()
        chosen.compression_ratio = 1 - job["share"]
        press = chosen(model)

    def first() -> None:
        with press:
            ids = torch.tensor([prompt])
            out = model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        written.append(int(out.logits[0, -1].argmax()))

    def further() -> None:
        logits = decode(model, written[-1], len(prompt) + len(written) - 1, cache)
        written.append(int(logits.argmax()))

    return clock(
        len(prompt),
        first,
        further,
        job["output_tokens"] - 1,
        lambda: (cache.peak_bytes, cache.held_bytes()),
    )


if __name__ == "__main__":
    main()
