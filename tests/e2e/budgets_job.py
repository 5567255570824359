"""Runs the same requests under several budgets: `python -m tests.e2e.budgets_job`, job on stdin.

One engine after another in one process, so that vLLM is imported once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.e2e.job import describe, drive


def answer_under(budget: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """Answers, blocks held and engine of one budget."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(**job["engine"], additional_config={"budgetkv": budget})
    answer = drive(llm, job)
    answer["engine"] = describe(llm)
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return answer


def main() -> None:
    job = json.load(sys.stdin)
    answers = {budget["policy"]: answer_under(budget, job) for budget in job["budgets"]}
    Path(job["answer_file"]).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
