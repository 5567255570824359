"""Runs the engines of one family in turn: `python -m tests.families.job`, job on stdin.

One process for a family: vLLM changes classes of Transformers for good. A job without runs answers
with what the start says of each of several configurations instead.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tests.e2e.both_ways import both_ways
from tests.e2e.job import describe, drive
from tests.families import weights
from tests.families.proof import Proof

# kinds of layers, by vLLM's name of what they keep
KINDS = {
    "QuotaSpec": "full",
    "FullAttentionSpec": "full",
    "SlidingWindowSpec": "windowed",
    "ChunkedLocalAttentionSpec": "chunked",
    "MambaSpec": "recurrent",
}


def answer_of(run: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    """Answers and layers of one engine; a budget that is None is vLLM as it is.

    Where the run sees `both_ways`, vLLM's attention on a CPU does; see `tests.e2e.both_ways`.
    """
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    budget = run["budget"]
    ours = {} if budget is None else {"additional_config": {"budgetkv": budget}}
    with both_ways() if run.get("both_ways") else nullcontext():
        llm = LLM(**{**engine, **run.get("engine", {}), **ours})
        answer = drive(llm, run)
    core = llm.llm_engine.engine_core.engine_core
    answer["engine"] = describe(llm)
    answer["block_tokens"] = core.vllm_config.cache_config.block_size
    answer["layers"] = layers_of(core.scheduler.kv_cache_config)
    answer["positions"] = positions_of(core.vllm_config.model_config)
    model = core.model_executor.driver_worker.worker.model_runner.get_model()
    answer["class"] = type(model).__name__
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return answer


def layers_of(kv_cache_config: Any) -> dict[str, int]:
    """How many layers there are of each kind."""
    counts: dict[str, int] = {}
    for group in kv_cache_config.kv_cache_groups:
        name = type(group.kv_cache_spec).__name__
        kind = KINDS.get(name, name)
        counts[kind] = counts.get(kind, 0) + len(group.layer_names)
    return counts


def positions_of(model: Any) -> str:
    """How positions enter, by the configuration of the language model."""
    text = model.hf_text_config
    if getattr(text, "position_embedding_type", "rope") == "nope":
        return "none"
    found = getattr(text, "rope_parameters", None) or {}
    each = [value for value in found.values() if isinstance(value, dict)] or [found]
    types = {rope.get("rope_type", "default") for rope in each} - {"default"}
    words = ["M-RoPE" if model.uses_mrope else "RoPE", *sorted(types)]
    share = min(rope.get("partial_rotary_factor") or 1.0 for rope in each)
    if share < 1.0:
        words.append(f"{share:.0%} of a head")
    return ", ".join(words)


def refusals_of(engines: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What the start says of each configuration; nothing is loaded."""
    import vllm_budgetkv

    vllm_budgetkv.register()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    # vLLM imports a class in a process of its own to look at it: 10 seconds each
    registry._run_in_subprocess = lambda inspect: inspect()
    said = {}
    for name, arguments in engines.items():
        try:
            EngineArgs(**arguments).create_engine_config()
        except ValueError as error:
            said[name] = str(error)
        else:
            said[name] = ""
    return said


def main() -> None:
    job = json.load(sys.stdin)
    if "engines" in job:
        answer: dict[str, Any] = refusals_of(job["engines"])
    else:
        proof = Proof()
        proof.install()
        answer = {name: answer_of(run, job["engine"]) for name, run in job["runs"].items()}
        answer["proof"] = proof.told()
    Path(job["answer_file"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    assert weights.LOAD_FORMAT
    main()
