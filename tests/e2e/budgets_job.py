"""Runs requests under several budgets: `python -m tests.e2e.budgets_job`, job on stdin.

One engine after another in one process, so that vLLM is imported once.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tests.e2e import devices
from tests.e2e.both_ways import both_ways
from tests.e2e.job import describe, drive
from tests.e2e.rounding import to_nearest


def answer_of(run: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    """Answers, blocks held and engine of one run; a budget that is None is vLLM as it is.

    A run may have arguments of its own in `engine`.

    A run that `rounds` lets stock vLLM round 8-bit keys and values; see `tests.e2e.rounding`. One
    that sees `both_ways` lets it attend to whole pictures; see `tests.e2e.both_ways`.
    """
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    budget = run["budget"]
    ours = {} if budget is None else {"additional_config": {"budgetkv": devices.allowed(budget)}}
    with (
        to_nearest() if run.get("rounds") else nullcontext(),
        both_ways() if run.get("both_ways") else nullcontext(),
    ):
        llm = LLM(**{**engine, **run.get("engine", {}), **ours})
        answer = drive(llm, run)
    answer["engine"] = describe(llm)
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return answer


def main() -> None:
    job = json.load(sys.stdin)
    answers = {name: answer_of(run, job["engine"]) for name, run in job["runs"].items()}
    Path(job["answer_file"]).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
