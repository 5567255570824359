"""One run in this process: start an engine, ask, free it; the process is used for many runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.quality.worker import ENVIRONMENT as OF_WORKERS
from benchmarks.quality.worker import free_memory
from benchmarks.real.results import RunResult, summarise
from benchmarks.real.tasks import make_examples

if TYPE_CHECKING:
    from benchmarks.real.plan import Run

ENGINE = {"max_num_seqs": 8, "max_num_batched_tokens": 1024, "use_tqdm_on_load": False}
ENVIRONMENT = OF_WORKERS | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}


def measure(run: Run, model: str, commit: str) -> RunResult:
    """Ask all examples of a run.

    Raises:
        QuotaExceededError: a request held more blocks than its quota.
    """
    from transformers import AutoTokenizer

    from benchmarks.real.lab import Setup, TextLab

    tokenizer = AutoTokenizer.from_pretrained(model)
    groups = [make_examples(t, run.length_tokens, run.count, tokenizer) for t in run.tasks]
    started = time.perf_counter()
    try:
        with TextLab(Setup(model=model, budget=run.budget(), engine=ENGINE)) as lab:
            outcomes = lab.ask([example for group in groups for example in group])
            del lab
        seconds = time.perf_counter() - started
    finally:
        free_memory()
    return summarise(run, outcomes, seconds, commit)
