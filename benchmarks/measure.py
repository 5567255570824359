"""Times one engine in a process of its own: `python -m benchmarks.measure`, job on stdin.

The engine core runs in the same process, so a step is timed without queues, and the blocks that a
request holds are read after every step. The last line of standard output is the answer as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

QUESTIONS = (
    "Which letter does the sign show?",
    "What colour is the background, and where is it?",
    "How many signs are to be seen?",
    "What stands beside the sign?",
    "In which frame does the letter change?",
    "Which of the letters comes last?",
)
FRAME_PIXELS = 448
FRAME_TOKENS = (FRAME_PIXELS // 28) ** 2
FRAMES_PER_GRID = 2


def video_prompt(llm: Any, prompt_tokens: int, seed: int, question: str = QUESTIONS[0]) -> Any:
    """A chat prompt of about `prompt_tokens` tokens: a rendered video and a question behind it."""
    import numpy as np

    from vllm_budgetkv.testing.frames import render_video

    num_frames = max(1, round(prompt_tokens / FRAME_TOKENS)) * FRAMES_PER_GRID
    frames = render_video(num_frames, size_pixels=(FRAME_PIXELS, FRAME_PIXELS), seed=seed)
    metadata = {
        "fps": 2.0,
        "total_num_frames": num_frames,
        "frames_indices": list(range(num_frames)),
    }
    video = (np.asarray(frames), metadata | {"do_sample_frames": False})
    text = (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
        f"{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    return llm._preprocess_cmpl_one({"prompt": text, "multi_modal_data": {"video": [video]}})


def run_request(llm: Any, name: str, prompt: Any, output_tokens: int) -> dict[str, Any]:
    """Prefill and decode one request alone; seconds of the steps, and blocks held at the peak."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    engine.add_request(name, prompt, params)
    prefill_seconds, decode_seconds, peak_blocks, prompt_tokens = 0.0, [], 0, 0
    while engine.has_unfinished_requests():
        started = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - started
        held_blocks = [len(blocks) for blocks in manager.req_to_blocks.values()]
        peak_blocks = max([peak_blocks, *held_blocks])
        if prompt_tokens:
            decode_seconds.append(seconds)
        else:
            prefill_seconds += seconds
        if outputs:
            prompt_tokens = len(outputs[0].prompt_token_ids)
    engine.step()
    return {
        "prompt_tokens": prompt_tokens,
        "prefill_seconds": prefill_seconds,
        "decode_ms": 1e3 * statistics.median(decode_seconds),
        "peak_blocks": peak_blocks,
    }


def block_bytes(llm: Any) -> int:
    """Bytes of one block over all layers."""
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    (group,) = config.kv_cache_groups
    return group.kv_cache_spec.page_size_bytes * len(group.layer_names)


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM

    llm = LLM(**job["engine"])
    run_request(llm, "warm-up", video_prompt(llm, 600, seed=99), 4)
    found = {}
    for size in job["sizes"]:
        found[str(size)] = [
            run_request(
                llm,
                f"n{size}q{number}",
                video_prompt(llm, size, seed=size, question=question),
                job["output_tokens"],
            )
            for number, question in enumerate(QUESTIONS[: job["questions"]])
        ]
    answer = {"sizes": found, "block_bytes": block_bytes(llm)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
