"""What it costs that answers say what their requests held: `python -m benchmarks.bench_answers`.

One engine serves the same requests again and again, eight at once, in turn with and without what
`--kv-answer-report` counts. Prints the medians of the ratios of neighbouring rounds (by the clock,
and by the time of the processor) and the ratio of the best rounds: above 1 it costs time.
"""

from __future__ import annotations

import json
import statistics
import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.bench_chunks import Round, arguments, serve, start

if TYPE_CHECKING:
    from collections.abc import Iterator


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
    said, unsaid = [], []
    for _ in range(options.repeats):
        said.append(serve(llm, prompts, options.output_tokens))
        with silent(llm):
            unsaid.append(serve(llm, prompts, options.output_tokens))
    sys.stdout.write(json.dumps(compare(said, unsaid)) + "\n")


if __name__ == "__main__":
    main()
