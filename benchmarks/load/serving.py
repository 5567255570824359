"""The server of one side and one pool, and every case that it serves."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from benchmarks.load import driving, pools
from benchmarks.load.cases import MOST_IMAGES, POOLS
from benchmarks.server import Server
from vllm_budgetkv.arithmetic.quota import good_batch_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from benchmarks.load.cases import Case, Pool
    from benchmarks.load.pools import Blocks

PAGE_TOKENS = 32
CHUNK_TOKENS = 1024
MAX_SEQS = 16
BATCH_TOKENS = good_batch_tokens(2 * CHUNK_TOKENS, CHUNK_TOKENS, MAX_SEQS)
# text that is tokenised again may be a little longer, and a chat has its template
SLACK_TOKENS = 128


def common_arguments(pool: Pool, dtype: str) -> list[str]:
    """Of the engine, on both sides."""
    video = {"video_backend": "opencv", "num_frames": -1}
    return [
        *("--dtype", dtype, "--enforce-eager", "--block-size", str(PAGE_TOKENS)),
        *("--max-model-len", str(pool.longest_tokens + SLACK_TOKENS)),
        *("--max-num-seqs", str(MAX_SEQS), "--max-num-batched-tokens", str(BATCH_TOKENS)),
        *("--limit-mm-per-prompt", json.dumps({"image": MOST_IMAGES, "video": 1})),
        # every frame that is sent, unless the request says otherwise
        *("--media-io-kwargs", json.dumps({"video": video})),
        "--skip-mm-profiling",
    ]


def budget_arguments(pool: Pool) -> list[str]:
    """Of the engine, on our side."""
    return [
        *("--kv-policy", "hybrid", "--kv-quota-tokens", str(pool.quota_tokens)),
        *("--kv-chunk-tokens", str(CHUNK_TOKENS)),
    ]


def environment(side: str) -> Mapping[str, str]:
    """Of the server: nothing is fetched; stock vLLM loads no plugin."""
    variables = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # for /reset_prefix_cache
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": str(pools.REPOSITORY),
    }
    return variables | {"VLLM_PLUGINS": ""} if side == "stock" else variables


def blocks_of(model: str, pool: Pool, dtype: str) -> Blocks:
    """Equal pools of both sides, as the plugin counts them."""
    server = [*common_arguments(pool, dtype), *budget_arguments(pool)]
    plan = pools.read_plan(model, pool, server)
    return pools.equal_blocks(pool, plan, page_tokens=PAGE_TOKENS, requests=MAX_SEQS)


def serve(
    side: str,
    blocks: Blocks,
    cases: dict[str, Case],
    model: str,
    *,
    dtype: str,
    seed: int,
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """Starts a server and runs the cases of one pool, one after the other.

    Args:
        side: "stock" or "ours".
        blocks: of both sides.
        cases: of the same pool, by name.
        model: folder.
        dtype: of model and cache.
        seed: of the first case's prompts; the same on both sides.
        folder: for the logs.

    Returns:
        Figures by case.
    """
    (name,) = {case.pool for case in cases.values()}
    pool = POOLS[name]
    arguments = common_arguments(pool, dtype)
    arguments += budget_arguments(pool) if side == "ours" else []
    arguments += ["--num-gpu-blocks-override", str(getattr(blocks, side))]
    # a client may have a video sampled
    arguments += ["--trust-request-mm-kwargs"]
    with Server(model, arguments, folder / f"{side}-{name}.log", environment(side)) as server:
        driving.warm_up(server, list(cases.values()), model, folder=folder)
        found = {}
        for number, (case_name, case) in enumerate(cases.items()):
            figures = driving.run_case(server, case, model, seed=seed + number, folder=folder)
            found[case_name] = figures
            print(f"  {case_name}: {progress(figures)}", flush=True)
    return found


def progress(figures: dict[str, Any]) -> str:
    """One line of a case."""
    return (
        f"{figures['completed']} done, {figures['failed']} failed in {figures['seconds']:.0f} s, "
        f"{figures['output_tokens_per_s']:.1f} tokens/s, "
        f"{figures['running_most']} at once, {figures['preemptions']} preemptions"
    )
