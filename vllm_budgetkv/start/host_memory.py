"""Whether the host has the memory that is to keep what quotas drop, and whether it keeps any."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_budgetkv.start.config import BudgetConfig

GIB = 1 << 30


def token_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of host memory that keep a token on one worker: K and V of all layers and KV heads."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    num_heads = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    return 2 * num_heads * model.get_head_size() * model.dtype.itemsize


def num_blocks(vllm_config: VllmConfig, config: BudgetConfig) -> int:
    """Host blocks of one worker; 0 for none. The scheduler and every worker count the same."""
    block_bytes = vllm_config.cache_config.block_size * token_bytes(vllm_config)
    return config.host_bytes // block_bytes


def check(vllm_config: VllmConfig, config: BudgetConfig) -> None:
    """Refuse host memory that keeps no block of tokens, or that the machine has not free.

    Raises:
        ValueError: with both numbers, and what to set.
    """
    import psutil

    if not config.host_bytes:
        return
    parallel, page_tokens = vllm_config.parallel_config, vllm_config.cache_config.block_size
    block_bytes = page_tokens * token_bytes(vllm_config)
    if not num_blocks(vllm_config, config):
        raise ValueError(
            f"--kv-host-memory {config.host_memory} keeps no block of {page_tokens} tokens, which "
            f"takes {block_bytes:,} bytes: raise it"
        )
    num_workers = parallel.world_size * parallel.data_parallel_size_local
    free_bytes, wanted_bytes = psutil.virtual_memory().available, num_workers * config.host_bytes
    if wanted_bytes > free_bytes:
        raise ValueError(
            f"--kv-host-memory {config.host_memory} for each of {num_workers} workers is "
            f"{wanted_bytes / GIB:.1f} GiB, but {free_bytes / GIB:.1f} GiB of this machine's "
            "memory are free: lower it"
        )
