"""What the vision encoder makes and keeps against the length of a video.

    python -m benchmarks.bench_encoder
    python -m benchmarks.bench_encoder --tokens 4000 16000 32000

Each video is served by an engine of its own, in groups of frames and as a whole (with
`--enable-mm-embeds`, which keeps videos whole); both answers must be equal. Embeddings that a step
makes are counted in the scheduler, those that are kept in the worker, after every step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import video_prompt
from vllm_budgetkv import budget_args
from vllm_budgetkv.testing.models import build_qwen2_5_vl

REPOSITORY = Path(__file__).parent.parent
OUTPUT_TOKENS = 4
MODES = ("groups", "whole")


def serve(video_tokens: int, mode: str) -> dict[str, Any]:
    """Serve one video in this process; the counts, and its answer."""
    from vllm import LLM, SamplingParams

    budget = budget_args(policy="hybrid", quota_tokens=2048, chunk_tokens=1024)
    llm = LLM(
        model=str(build_qwen2_5_vl(REPOSITORY / "build" / "models")),
        dtype="float32",
        enforce_eager=True,
        max_model_len=video_tokens + 1024,
        max_num_seqs=4,
        max_num_batched_tokens=2048,
        block_size=32,
        limit_mm_per_prompt={"image": 0, "video": 1},
        enable_mm_embeds=mode == "whole",
        disable_log_stats=True,
        **budget,
    )
    engine, core = llm.llm_engine, llm.llm_engine.engine_core.engine_core
    schedule, scheduler = core.scheduler.schedule, core.scheduler
    kept = core.model_executor.driver_worker.worker.model_runner.encoder_cache
    most = {"made": 0, "kept": 0}

    def counted(*args: Any, **kwargs: Any) -> Any:
        scheduled = schedule(*args, **kwargs)
        made = sum(
            scheduler.requests[name].get_num_encoder_embeds(item)
            for name, items in scheduled.scheduled_encoder_inputs.items()
            for item in items
        )
        most["made"] = max(most["made"], made)
        return scheduled

    scheduler.schedule = counted
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    engine.add_request("video", video_prompt(llm, video_tokens, seed=0), params)
    answer: Any = None
    while engine.has_unfinished_requests():
        answer = (engine.step() or [answer])[0]
        most["kept"] = max(most["kept"], sum(len(rows) for rows in kept.values()))
    return {
        "mode": mode,
        "video_tokens": video_tokens,
        "prompt_tokens": len(answer.prompt_token_ids),
        "room_tokens": scheduler.encoder_cache_manager.cache_size,
        "made_tokens": most["made"],
        "kept_tokens": most["kept"],
        "answer": list(answer.outputs[0].token_ids),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4000, 16000])
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode is not None:
        print(json.dumps(serve(options.tokens[0], options.mode)), file=sys.stdout)
        return
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    for video_tokens in options.tokens:
        answers = []
        for mode in MODES:
            words = [
                "-m",
                "benchmarks.bench_encoder",
                "--tokens",
                str(video_tokens),
                "--mode",
                mode,
            ]
            done = subprocess.run(
                [sys.executable, *words],
                env=os.environ | variables,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found = json.loads(done.stdout.splitlines()[-1])
            answers.append(found.pop("answer"))
            print(json.dumps(found), flush=True)
        assert answers[0] == answers[1], "groups of frames changed the answer"


if __name__ == "__main__":
    main()
