"""What it costs that chunks end where the request says: `python -m benchmarks.bench_chunks`.

One engine serves the same requests again and again, eight at once: in turn as it does, and with
chunks that take what is left of the batch, as vLLM cuts them. Prints the median of the ratios of
neighbouring rounds, and how many answers to equal prompts differed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import video_prompt
from vllm_budgetkv import budget_args
from vllm_budgetkv.testing.models import build_qwen2_5_vl

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).parent.parent
MODEL = {
    "layers": 4,
    "hidden": 512,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 64,
    "intermediate": 1024,
}
CONCURRENCY = 8
PAGE_TOKENS = 32
# prompts of one round, in tokens; each kind is asked several times
PROMPTS = (2000, 3000, 600)


@contextmanager
def cut_by_load(scheduler: Any, chunk_tokens: int) -> Iterator[None]:
    """Let chunks take what is left of the batch and of the encoder."""

    def cut(request: Any, num_new_tokens: int, *_: int) -> int:
        return min(num_new_tokens, chunk_tokens)

    stock = super(type(scheduler), scheduler)._try_schedule_encoder_inputs
    scheduler._mamba_block_aligned_split = cut
    scheduler._try_schedule_encoder_inputs = stock
    yield
    del scheduler._mamba_block_aligned_split, scheduler._try_schedule_encoder_inputs


def serve(llm: Any, prompts: list[Any], output_tokens: int) -> tuple[float, list[tuple[int, ...]]]:
    """Seconds for all prompts, never more than eight at once, and the answers in their order."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    answers: dict[str, tuple[int, ...]] = {}
    waiting = list(enumerate(prompts))
    running = 0
    started = time.perf_counter()
    while waiting or engine.has_unfinished_requests():
        while waiting and running < CONCURRENCY:
            number, prompt = waiting.pop(0)
            engine.add_request(str(number), prompt, params)
            running += 1
        for output in engine.step():
            if output.finished:
                running -= 1
                answers[output.request_id] = tuple(output.outputs[0].token_ids)
    seconds = time.perf_counter() - started
    return seconds, [answers[str(number)] for number in range(len(prompts))]


def num_different(answers: list[tuple[int, ...]]) -> int:
    """Answers to a prompt that were not the first to it, summed over the prompts."""
    kinds = [set(answers[kind :: len(PROMPTS)]) for kind in range(len(PROMPTS))]
    return sum(len(kind) - 1 for kind in kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=None, help="vLLM's choice if not given")
    parser.add_argument("--times", type=int, default=8, help="how often each prompt is asked")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--policy", default="hybrid")
    options = parser.parse_args()
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM

    llm = LLM(
        str(build_qwen2_5_vl(REPOSITORY / "build" / "models", **MODEL)),
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        block_size=PAGE_TOKENS,
        max_num_seqs=CONCURRENCY,
        max_num_batched_tokens=options.batch_tokens,
        disable_log_stats=True,
        limit_mm_per_prompt={"video": 1},
        media_io_kwargs={"video": {"num_frames": -1}},
        **budget_args(policy=options.policy, quota_tokens=512, chunk_tokens=options.chunk_tokens),
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    kinds = [video_prompt(llm, size, seed=size) for size in PROMPTS]
    prompts = kinds * options.times
    serve(llm, prompts[: 2 * len(kinds)], 4)
    ratios, whole_differ, cut_differ = [], [], []
    for _ in range(options.repeats):
        whole_seconds, answers = serve(llm, prompts, options.output_tokens)
        whole_differ.append(num_different(answers))
        with cut_by_load(scheduler, options.chunk_tokens):
            cut_seconds, answers = serve(llm, prompts, options.output_tokens)
        cut_differ.append(num_different(answers))
        ratios.append(cut_seconds / whole_seconds)
        sys.stderr.write(f"{whole_seconds:.2f} s, cut by load {cut_seconds:.2f} s\n")
    found = {
        "batch_tokens": llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens,
        "throughput": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "most": round(max(ratios), 3),
        "different_answers": whole_differ,
        "different_answers_cut_by_load": cut_differ,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
