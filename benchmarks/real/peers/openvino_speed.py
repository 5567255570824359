"""Times OpenVINO GenAI, with eviction or without; in its environment, job on stdin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.real.peers.clock import clock
from benchmarks.real.peers.judged import answer, read_job
from benchmarks.real.peers.openvino_process import config_of, open_pipeline, tensor_of

if TYPE_CHECKING:
    from benchmarks.real.peers.clock import Sample


def main() -> None:
    job = read_job()
    pipe = open_pipeline(job)
    request(pipe, 0, job["warmup"], job["output_tokens"])
    answer([request(pipe, 1, job["prompt"], job["output_tokens"]).row()])


def request(pipe: Any, number: int, prompt: list[int], output_tokens: int) -> Sample:
    held: list[tuple[float, float]] = []

    def step() -> None:
        pipe.step()
        metrics = pipe.get_metrics()
        size = metrics.kv_cache_size_in_bytes / 100
        held.append((size * metrics.max_cache_usage, size * metrics.cache_usage))

    def first() -> None:
        handle.append(pipe.add_request(number, tensor_of(prompt), config_of(output_tokens)))
        while not handle[0].can_read():
            step()

    handle: list[Any] = []
    sample = clock(len(prompt), first, step, output_tokens - 1, lambda: held[-1])
    assert not pipe.has_non_finished_requests()
    return sample


if __name__ == "__main__":
    main()
