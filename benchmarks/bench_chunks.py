"""What it costs that chunks end where the request says: `python -m benchmarks.bench_chunks`.

One engine serves the same requests again and again, eight at once: in turn as it does, and with
chunks that take what is left of the batch, as vLLM cuts them. Prints the medians of the ratios of
neighbouring rounds (by the clock, and by the time of the processor), the ratio of the best rounds,
which tells more on a machine that others use, the steps of a round, and how many answers to equal
prompts differed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass
class Round:
    """What it took to serve all prompts once, and the answers in the order of the prompts."""

    seconds: float
    processor_seconds: float
    num_steps: int
    answers: list[tuple[int, ...]]

    @property
    def num_different(self) -> int:
        """Answers to a prompt that were not the first to it, summed over the prompts."""
        kinds = [set(self.answers[kind :: len(PROMPTS)]) for kind in range(len(PROMPTS))]
        return sum(len(kind) - 1 for kind in kinds)


def serve(llm: Any, prompts: list[Any], output_tokens: int) -> Round:
    """Serve all prompts, never more than eight at once."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    answers: dict[str, tuple[int, ...]] = {}
    waiting = list(enumerate(prompts))
    running = num_steps = 0
    started = (time.perf_counter(), time.process_time())
    while waiting or engine.has_unfinished_requests():
        while waiting and running < CONCURRENCY:
            number, prompt = waiting.pop(0)
            engine.add_request(str(number), prompt, params)
            running += 1
        num_steps += 1
        for output in engine.step():
            if output.finished:
                running -= 1
                answers[output.request_id] = tuple(output.outputs[0].token_ids)
    ended = (time.perf_counter(), time.process_time())
    seconds, processor_seconds = (stop - start for start, stop in zip(started, ended, strict=True))
    in_order = [answers[str(number)] for number in range(len(prompts))]
    return Round(seconds, processor_seconds, num_steps, in_order)


def compare(whole: list[Round], cut: list[Round]) -> dict[str, Any]:
    """Medians of the ratios of neighbouring rounds; above 1 is faster than chunks cut by load."""
    pairs = list(zip(whole, cut, strict=True))
    by_clock = [other.seconds / one.seconds for one, other in pairs]
    by_processor = [other.processor_seconds / one.processor_seconds for one, other in pairs]
    return {
        "throughput": round(statistics.median(by_clock), 3),
        "throughput_by_processor": round(statistics.median(by_processor), 3),
        "throughput_of_best": round(min(x.seconds for x in cut) / min(x.seconds for x in whole), 3),
        "all_by_processor": [round(ratio, 3) for ratio in by_processor],
        "steps": whole[0].num_steps,
        "steps_cut_by_load": cut[0].num_steps,
        "different_answers": [one.num_different for one in whole],
        "different_answers_cut_by_load": [one.num_different for one in cut],
    }


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What a comparison of rounds in one engine takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=None, help="vLLM's choice if not given")
    parser.add_argument("--times", type=int, default=8, help="how often each prompt is asked")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--policy", default="hybrid")
    return parser


def start(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """An engine that has served some requests, and the prompts of a round."""
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
    kinds = [video_prompt(llm, size, seed=size) for size in PROMPTS]
    prompts = kinds * options.times
    serve(llm, prompts[: 2 * len(kinds)], 4)
    return llm, prompts


def main() -> None:
    options = arguments(__doc__).parse_args()
    llm, prompts = start(options)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    whole, cut = [], []
    for _ in range(options.repeats):
        whole.append(serve(llm, prompts, options.output_tokens))
        with cut_by_load(scheduler, options.chunk_tokens):
            cut.append(serve(llm, prompts, options.output_tokens))
    batch_tokens = llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    sys.stdout.write(json.dumps({"batch_tokens": batch_tokens} | compare(whole, cut)) + "\n")


if __name__ == "__main__":
    main()
