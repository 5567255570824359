"""Times stock vLLM, or this plugin in it; in the project's own environment, job on stdin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.real.peers.clock import clock
from benchmarks.real.peers.judged import answer, read_job

if TYPE_CHECKING:
    from benchmarks.real.peers.clock import Sample


def main() -> None:
    from vllm import LLM

    job = read_job()
    report = Path(job["report_file"])
    report.unlink(missing_ok=True)
    llm = LLM(**job["engine"])
    request(llm, "warm-up", job["warmup"], job["output_tokens"])
    sample = request(llm, "timed", job["prompt"], job["output_tokens"])
    row = sample.row()
    if report.is_file():
        # the plugin's own count: blocks with digests and positions, tables and probes
        (record,) = [r for r in map(json.loads, report.read_text().splitlines()) if is_timed(r)]
        row["kv_peak_bytes"] = record["kv_bytes"]
    answer([row])


def is_timed(record: dict[str, Any]) -> bool:
    return record["request_id"].startswith("timed")


def request(llm: Any, name: str, prompt: list[int], output_tokens: int) -> Sample:
    from vllm import SamplingParams

    from benchmarks.measure import block_bytes

    engine = llm.llm_engine
    (manager,) = (
        engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers
    )
    held_blocks, written = [0], []

    def step() -> None:
        outputs = engine.step()
        held_blocks.extend(len(blocks) for blocks in manager.req_to_blocks.values())
        written.extend(outputs)

    def first() -> None:
        params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while not written:
            step()

    def held() -> tuple[float, float]:
        size = block_bytes(llm)
        return max(held_blocks) * size, held_blocks[-1] * size

    sample = clock(len(prompt), first, step, output_tokens - 1, held)
    assert not engine.has_unfinished_requests()
    # the worker reports what ended in the last step when the next one starts
    engine.step()
    return sample


if __name__ == "__main__":
    main()
