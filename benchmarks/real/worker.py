"""One run in this process: start an engine, ask, free it; the process is used for many runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.quality.worker import ENVIRONMENT as OF_WORKERS
from benchmarks.quality.worker import free_memory
from benchmarks.real.another import another_question, require_reuse
from benchmarks.real.frames import FRAME_TASKS, make_frame_examples
from benchmarks.real.plan import PAGE_TOKENS
from benchmarks.real.results import RunResult, summarise
from benchmarks.real.tasks import make_examples

if TYPE_CHECKING:
    from benchmarks.real.plan import Run

ENGINE = {"max_num_seqs": 8, "max_num_batched_tokens": 1024, "use_tqdm_on_load": False}
# pictures of one request; the tower is not tried with as many at start
FRAME_ENGINE = ENGINE | {
    "limit_mm_per_prompt": {"image": 512},
    # vLLM tells equal pictures of two requests by it
    "mm_processor_cache_gb": 1,
    "skip_mm_profiling": True,
}
# the least that vLLM's own attention on CPUs takes
STOCK_BLOCK_TOKENS = 32
ENVIRONMENT = OF_WORKERS | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}


def measure(run: Run, model: str, commit: str) -> RunResult:
    """Ask all examples of a run.

    Raises:
        QuotaExceededError: a request held more blocks than its quota.
    """
    from transformers import AutoTokenizer

    from benchmarks.real.lab import Setup, TextLab

    tokenizer = AutoTokenizer.from_pretrained(model)
    groups = []
    for task in run.tasks:
        make = make_frame_examples if task in FRAME_TASKS else make_examples
        groups.append(make(task, run.length_tokens, run.count, tokenizer))
    setup = Setup(
        model=model,
        budget=run.budget(),
        page_tokens=STOCK_BLOCK_TOKENS if run.stock else PAGE_TOKENS,
        cache_dtype=run.cache_dtype,
        dtype=run.dtype,
        engine=FRAME_ENGINE if run.shows_frames else ENGINE,
    )
    started = time.perf_counter()
    try:
        with TextLab(setup) as lab:
            examples = [example for group in groups for example in group]
            if run.asks_before:
                lab.force([another_question(example) for example in examples])
            outcomes = lab.ask(examples)
            if run.asks_before:
                require_reuse(outcomes)
            del lab
        seconds = time.perf_counter() - started
    finally:
        free_memory()
    return summarise(run, outcomes, seconds, commit)
