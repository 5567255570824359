"""Whether the host has the memory that is to keep what quotas drop, and whether it keeps any."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_budgetkv.start import stored

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_budgetkv.start.config import BudgetConfig
    from vllm_budgetkv.start.engine_config import EngineConfig

GIB = 1 << 30


def token_bytes(engine: EngineConfig) -> int:
    """Bytes of host memory that keep a token on one worker: K and V of all layers and KV heads."""
    model, parallel = engine.model_config, engine.parallel_config
    num_heads = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    return 2 * num_heads * model.get_head_size() * stored.element_bytes(engine)


def num_blocks(engine: EngineConfig, config: BudgetConfig) -> int:
    """Host blocks of one worker; 0 for none. The scheduler and every worker count the same."""
    block_bytes = engine.cache_config.block_size * token_bytes(engine)
    return config.host_bytes // block_bytes


def knows_pictures(vllm_config: VllmConfig) -> bool:
    """Whether pictures and videos are named by what they show, so that two prompts may share one.

    vLLM names them by their request where nothing of its own would ask for more.
    """
    media = vllm_config.model_config.multimodal_config
    if media is None or media.mm_processor_cache_gb > 0:
        return True
    return vllm_config.cache_config.enable_prefix_caching


def check(vllm_config: VllmConfig, config: BudgetConfig) -> None:
    """Refuse host memory that keeps no block of tokens, or that the machine has not free.

    Raises:
        ValueError: with both numbers, and what to set.
    """
    import psutil

    if not config.host_bytes:
        return
    check_block(vllm_config, config)
    parallel = vllm_config.parallel_config
    num_workers = parallel.world_size * parallel.data_parallel_size_local
    free_bytes, wanted_bytes = psutil.virtual_memory().available, num_workers * config.host_bytes
    if wanted_bytes > free_bytes:
        raise ValueError(
            f"--kv-host-memory {config.host_memory} for each of {num_workers} workers is "
            f"{wanted_bytes / GIB:.1f} GiB, but {free_bytes / GIB:.1f} GiB of this machine's "
            "memory are free: lower it"
        )


def check_block(engine: EngineConfig, config: BudgetConfig) -> None:
    """Refuse host memory that keeps no block of tokens, on whatever machine.

    Raises:
        ValueError: with both numbers.
    """
    page_tokens = engine.cache_config.block_size
    if config.host_bytes and not num_blocks(engine, config):
        raise ValueError(
            f"--kv-host-memory {config.host_memory} keeps no block of {page_tokens} tokens, which "
            f"takes {page_tokens * token_bytes(engine):,} bytes: raise it"
        )
