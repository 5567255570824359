"""Whether the pool holds one request at quota, said in terms of the quota before vLLM says it.

vLLM's own check asks for a smaller `--max-model-len`, which changes nothing under a quota.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.start import stored
from vllm_budgetkv.start.groups import groups_of

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.start.engine_config import EngineConfig

# vLLM's block pool keeps one block that stands for none
RESERVED_BLOCKS = 1


@dataclass(frozen=True)
class Windows:
    """What layers with windows take of a pool.

    Args:
        blocks: that a request holds at most for them.
        block_bytes: bytes of a block, on one worker, that serves them and ours.
    """

    blocks: int
    block_bytes: int


def block_bytes(engine: EngineConfig, quota: Quota) -> int:
    """Bytes of a block on one worker: head-pages for every KV head of the layers of a group."""
    layout = stored.layout_of(engine, quota.page_tokens)
    num_heads = engine.model_config.get_num_kv_heads(engine.parallel_config)
    num_pages = groups_of(engine).block_layers * num_heads * quota.block_pages
    return num_pages * layout.page_bytes


def blocks_of(
    engine: EngineConfig, quota: Quota, pool_bytes: int | None, windows: Windows | None = None
) -> int | None:
    """Blocks of the pool; None where they are not known yet.

    Args:
        engine: its configuration; `num_gpu_blocks_override` goes before the bytes.
        quota: for the sizes of a block.
        pool_bytes: memory that the pool gets, None if unknown.
        windows: once the layers are known, if some have windows.
    """
    override = engine.cache_config.num_gpu_blocks_override
    if override is not None or pool_bytes is None:
        return override
    return pool_bytes // (windows.block_bytes if windows else block_bytes(engine, quota))


def requests_at_once(pool_blocks: int, request_blocks: int) -> int:
    """Requests of so many blocks each that a pool holds together."""
    return max(0, pool_blocks - RESERVED_BLOCKS) // request_blocks


def check(
    engine: EngineConfig,
    quota: Quota,
    pool_bytes: int | None,
    options: str | None = None,
    windows: Windows | None = None,
) -> None:
    """Refuse a pool in which a request at quota never fits; arguments as for `blocks_of`.

    `options` names what makes the pool larger; None for the options of this platform. A policy
    without a quota is not for here: `--max-model-len` decides there, as vLLM says.

    Raises:
        ValueError: names the quota, the pool, and what to set.
    """
    pool_blocks = blocks_of(engine, quota, pool_bytes, windows)
    state_blocks, window_blocks = groups_of(engine).blocks_beside, windows.blocks if windows else 0
    other_blocks = state_blocks + window_blocks + RESERVED_BLOCKS
    if pool_blocks is None or quota.blocks + other_blocks <= pool_blocks:
        return
    free_blocks, wanted_blocks = pool_blocks - other_blocks, quota.blocks + other_blocks
    smaller = f"set --kv-page-quota to at most {free_blocks}, or "
    each_bytes = windows.block_bytes if windows else block_bytes(engine, quota)
    wanted_mib = ceil_div(wanted_blocks * each_bytes, 1 << 20)
    beside = f" and {state_blocks} of recurrent state" if state_blocks else ""
    beside += f" and {window_blocks} of windows" if window_blocks else ""
    raise ValueError(
        f"one request may hold {quota.blocks} blocks of {quota.block_tokens} tokens{beside}, but "
        f"the pool has {pool_blocks}, of which vLLM reserves {RESERVED_BLOCKS}: "
        f"{smaller if free_blocks >= quota.min_blocks else ''}give the pool {wanted_blocks} blocks "
        f"({wanted_mib} MiB): raise {options or _pool_options(engine)}"
    )


def _pool_options(engine: EngineConfig) -> str:
    from vllm.platforms import current_platform

    if engine.cache_config.num_gpu_blocks_override is not None:
        return "--num-gpu-blocks-override"
    if current_platform.is_cpu():
        return "VLLM_CPU_KVCACHE_SPACE (GiB) or --kv-cache-memory-bytes"
    return "--gpu-memory-utilization or --kv-cache-memory-bytes"
