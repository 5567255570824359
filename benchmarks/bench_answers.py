"""What it costs that answers say what their requests held: `python -m benchmarks.bench_answers`.

One engine serves the same requests again and again, eight at once, in turn with and without what
`--kv-answer-report` counts. Prints the medians of the ratios of neighbouring rounds (by the clock,
and by the time of the processor) and the ratio of the best rounds: above 1 it costs time. A busy
machine moves these by more than what is asked for, so rounds of a third kind are timed from inside:
the share of their time that is spent where something is counted, told or said.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.bench_chunks import Round, arguments, serve, start
from vllm_budgetkv.cache.compressor import Compressor
from vllm_budgetkv.cache.report import Reports
from vllm_budgetkv.scheduler.answers import Answers
from vllm_budgetkv.scheduler.scheduler import BudgetScheduler
from vllm_budgetkv.worker import telling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# all that runs for the sake of answers, in workers and in the engine core
SPENDERS: tuple[tuple[Any, str], ...] = (
    (Compressor, "_note_mass"),
    (Reports, "prefilled"),
    (Reports, "_count_recalled"),
    (Reports, "take"),
    (telling, "_add"),
    (Answers, "note"),
    (Answers, "of"),
    (Answers, "forget"),
    (BudgetScheduler, "_follow"),
)


@dataclass
class Stopwatch:
    """Seconds that were spent inside some functions; one inside another counts once."""

    seconds: float = 0.0
    depth: int = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            self.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.perf_counter() - started

        return timed


@contextmanager
def watched() -> Iterator[Stopwatch]:
    """Time what `SPENDERS` take. The clock itself is part of it, so this is an upper bound."""
    stopwatch = Stopwatch()
    with ExitStack() as stack:
        for owner, name in SPENDERS:
            replaced = stopwatch.around(getattr(owner, name))
            stack.enter_context(patch.object(owner, name, replaced))
        yield stopwatch


@contextmanager
def silent(llm: Any) -> Iterator[None]:
    """Count nothing and say nothing, as with `--no-kv-answer-report`."""
    core = llm.llm_engine.engine_core.engine_core
    cache = core.model_executor.driver_worker.worker.budget_cache
    layers, answers = cache.layers, core.scheduler._answers
    cache.layers = replace(layers, compressor=replace(layers.compressor, notes_mass=False))
    cache.reports.summarizes, core.scheduler._answers = False, None
    yield
    cache.layers, core.scheduler._answers = layers, answers
    cache.reports.summarizes = True


def compare(said: list[Round], unsaid: list[Round]) -> dict[str, Any]:
    pairs = list(zip(said, unsaid, strict=True))
    by_processor = [one.processor_seconds / other.processor_seconds for one, other in pairs]
    return {
        "time": round(statistics.median(one.seconds / other.seconds for one, other in pairs), 4),
        "time_by_processor": round(statistics.median(by_processor), 4),
        "time_of_best": round(min(x.seconds for x in said) / min(x.seconds for x in unsaid), 4),
        "all_by_processor": [round(ratio, 4) for ratio in by_processor],
        "equal_answers": all(one.answers == other.answers for one, other in pairs),
    }


def main() -> None:
    options = arguments(__doc__).parse_args()
    llm, prompts = start(options)
    said, unsaid, shares = [], [], []
    for _ in range(options.repeats):
        said.append(serve(llm, prompts, options.output_tokens))
        with silent(llm):
            unsaid.append(serve(llm, prompts, options.output_tokens))
        with watched() as stopwatch:
            seconds = serve(llm, prompts, options.output_tokens).seconds
        shares.append(round(stopwatch.seconds / seconds, 5))
    found = compare(said, unsaid) | {"share_inside": statistics.median(shares), "shares": shares}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
