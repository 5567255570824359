"""One run in this process: start an engine, ask, free it; the process is used for many runs."""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, Any

from benchmarks.quality.instructions import INSTRUCTIONS
from benchmarks.quality.models import knows_notation
from benchmarks.quality.results import RunResult, summarise
from benchmarks.quality.suite import make_examples

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.quality.lab import Outcome, Setup
    from benchmarks.quality.plan import Run
    from benchmarks.quality.suite import Example

ENGINE = {"max_num_seqs": 16, "max_num_batched_tokens": 2048, "use_tqdm_on_load": False}
# of the process that starts the workers: OpenMP reads its own when torch is imported, before
# anything of ours runs; one thread each, or two engines wait for each other's turns
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}


def measure(run: Run, model: str, engine: Mapping[str, Any], commit: str) -> RunResult:
    """Ask all examples of a run.

    Args:
        run: what to ask of which policy.
        model: folder or name that vLLM can load.
        engine: further arguments of `LLM`.
        commit: what is measured.

    Raises:
        QuotaExceededError: a request held more blocks than its quota.
    """
    from benchmarks.quality.lab import Setup

    setup = Setup(
        model=model,
        budget=run.budget(),
        page_tokens=run.page_tokens,
        cache_dtype=run.cache_dtype,
        dtype=run.dtype,
        instructions=None if knows_notation(model) else INSTRUCTIONS,
        engine=ENGINE | dict(engine),
    )
    # task by task: the pixels of all prompts at once would not fit the memory
    groups = [make_examples(task, run.length_tokens, run.count) for task in run.tasks]
    try:
        started = time.perf_counter()
        outcomes = ask(run, setup, groups)
        seconds = time.perf_counter() - started
    finally:
        free_memory()
    return summarise(run, outcomes, seconds, commit)


def ask(run: Run, setup: Setup, groups: list[list[Example]]) -> list[Outcome]:
    """Start the engine or the engines of a run, and ask."""
    from benchmarks.quality.inside import closing
    from benchmarks.quality.lab import Lab
    from benchmarks.quality.lookahead_layers import ask_with_layers
    from benchmarks.quality.oracle import ask_with_oracle
    from benchmarks.quality.small_input import SmallInputLab

    if run.oracle:
        return ask_with_oracle(setup, [example for group in groups for example in group])
    if run.lookahead_layers is not None:
        return ask_with_layers(setup, groups, run.lookahead_layers)
    lab = Lab(setup) if run.input == "as is" else SmallInputLab(setup, run.input)
    with closing(lab):
        return [outcome for group in groups for outcome in lab.ask(group)]


def free_memory() -> None:
    """Gives back the memory and the process group of an engine that nothing refers to."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()
