"""The quota of a plan: the user's, or the largest with which all requests run at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.start import pool_size
from vllm_budgetkv.start.resolve import resolve_quota

if TYPE_CHECKING:
    from vllm_budgetkv.cli.costs import RequestCost
    from vllm_budgetkv.cli.engine import PlannedEngine
    from vllm_budgetkv.cli.memory import Pool
    from vllm_budgetkv.start.config import BudgetConfig


@dataclass(frozen=True)
class Choice:
    """The plugin's options with a quota in them.

    Args:
        config: the options.
        reason: how the quota was chosen, in words.
        is_suggested: whether the user left it open.
        is_needed: False where a full cache holds all requests that shall run at once.
    """

    config: BudgetConfig
    reason: str
    is_suggested: bool = False
    is_needed: bool = True


def choose_quota(
    engine: PlannedEngine, concurrency: int, pool: Pool | None, stock: RequestCost
) -> Choice:
    """The quota that was given, or one for `concurrency` requests in this pool.

    `stock` is what a request costs in a full cache.

    Raises:
        ValueError: there is nothing to choose by, or the pool is too small for so many requests.
    """
    if not engine.needs_quota:
        config = engine.config()
        return Choice(
            config, "as given" if config.compresses else f"none: {config.policy} has none"
        )
    longest_blocks = ceil_div(engine.model_config.max_model_len, engine.cache_config.block_size)
    config = engine.config(page_quota=longest_blocks)
    # holds the longest request, so it is no quota yet, but knows the sizes and the smallest
    whole = resolve_quota(engine, config)
    pool_blocks = pool_size.blocks_of(engine, whole, pool.num_bytes if pool else None)
    if pool_blocks is None:
        raise ValueError(
            "nothing tells how large a quota may be: say --gpu-memory 80GiB, the memory of a GPU; "
            "or --kv-cache-memory-bytes, that of its KV cache alone; or give a quota, as "
            "--kv-page-quota 64"
        )
    if stock.at_once is not None and stock.at_once >= concurrency:
        reason = f"none is needed: a full cache holds {stock.at_once:,} such requests at once"
        return Choice(config, reason, is_suggested=True, is_needed=False)
    blocks = max(0, pool_blocks - pool_size.RESERVED_BLOCKS) // concurrency
    if blocks < whole.min_blocks:
        raise ValueError(_too_many(concurrency, pool_blocks, whole.min_blocks, pool))
    reason = f"the largest with which {concurrency:,} requests run at once"
    return Choice(engine.config(page_quota=blocks), reason, is_suggested=True)


def _too_many(concurrency: int, pool_blocks: int, min_blocks: int, pool: Pool | None) -> str:
    """That the pool is too small for any quota, and what to change."""
    usable_blocks = pool_blocks - pool_size.RESERVED_BLOCKS
    most = max(0, usable_blocks) // min_blocks
    fewer = f"lower --concurrency to at most {most}, " if most else ""
    options = pool.options if pool else "--num-gpu-blocks-override"
    return (
        f"the pool of {pool_blocks:,} blocks leaves {max(0, usable_blocks) // concurrency:,} for "
        f"each of {concurrency:,} requests, and a quota must be at least {min_blocks:,}: "
        f"{fewer}lower --kv-chunk-tokens, or raise {options}"
    )
