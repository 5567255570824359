"""What the scheduler says at start: the quota that was resolved, and what it means for requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_budgetkv.start import host_memory, layer_kinds

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.arithmetic.recall import Recall
    from vllm_budgetkv.start.config import BudgetConfig
    from vllm_budgetkv.start.request_rules import RequestRules

# a child of vLLM's logger, which alone has a handler
logger = init_logger("vllm.plugins.budgetkv")


@dataclass(frozen=True, kw_only=True)
class Banner:
    """What was resolved.

    Args:
        vllm_config: of the engine.
        config: of the plugin.
        rules: what requests get, and what they may ask for.
        pool_blocks: blocks of the pool.
        blocks_beside: blocks that a request holds for layers of other kinds.
        host_blocks: blocks of host memory of one worker.
    """

    vllm_config: VllmConfig
    config: BudgetConfig
    rules: RequestRules
    pool_blocks: int
    blocks_beside: int
    host_blocks: int

    @property
    def _quota(self) -> Quota:
        return self.rules.default.quota

    @property
    def _max_model_len(self) -> int:
        return self.vllm_config.model_config.max_model_len

    def log(self) -> None:
        """Say it all, once."""
        quota = self._quota
        if not quota.compresses:
            logger.info("budgetkv: policy %s, no quota", self.config.policy)
        else:
            self._log_quota()
        if layer_kinds.pads_values(self.vllm_config.model_config):
            self._log_padding()
        if self.config.compresses and quota.fits(self._max_model_len):
            logger.warning(
                "budgetkv: the quota holds the %d tokens of --max-model-len, so nothing will be "
                "compressed: lower the quota or raise --max-model-len",
                self._max_model_len,
            )

    def _log_padding(self) -> None:
        sizes = layer_kinds.head_sizes(self.vllm_config.model_config)
        key_size, value_size = sizes["full_attention"]
        logger.info(
            "budgetkv: values of %d elements take as much room as keys, of %d: keys and values are "
            "%.2f times as long as they need be",
            value_size,
            key_size,
            2 * key_size / (key_size + value_size),
        )

    def _log_quota(self) -> None:
        quota = self._quota
        logger.info(
            "budgetkv: policy %s, quota %d blocks of %d tokens (%d tokens per head, %.0f%% of them "
            "retained budget), chunks of %d tokens, %.1f requests at quota fit the pool of %d "
            "blocks, look-ahead %s",
            self.config.policy,
            quota.blocks,
            quota.block_tokens,
            quota.tokens,
            100 * quota.budget_tokens / quota.tokens,
            quota.chunk_tokens,
            self.pool_blocks / (quota.blocks + self.blocks_beside),
            self.pool_blocks,
            "on" if self.config.looks_ahead else "off",
        )
        if self.blocks_beside:
            logger.info(
                "budgetkv: the quota is that of the %d layers with full attention; beside it a "
                "request holds at most %d blocks of the pool for its other layers",
                quota.num_layers,
                self.blocks_beside,
            )
        policies, most_blocks = self.config.policies[1:], self.rules.most_blocks
        if policies or most_blocks > quota.blocks:
            logger.info(
                "budgetkv: a request may ask for %d to %d blocks%s",
                quota.min_blocks,
                most_blocks,
                f", and for policy {' or '.join(policies)}" if policies else "",
            )
        if quota.recall is not None:
            self._log_recall(quota.recall)

    def _log_recall(self, recall: Recall) -> None:
        kept_tokens = self.host_blocks * self._quota.page_tokens
        logger.info(
            "budgetkv: %s of host memory keep %d tokens of prompts beyond their quota, %d of %d "
            "heads bring tokens back, %s prompt begins with what another left there",
            self.config.host_memory,
            kept_tokens,
            recall.num_heads,
            recall.all_heads,
            "a" if self.config.reuse else "no",
        )
        if self.config.reuse and not host_memory.knows_pictures(self.vllm_config):
            logger.warning(
                "budgetkv: with --mm-processor-cache-gb 0 and --no-enable-prefix-caching vLLM does "
                "not tell which pictures are equal, so no prompt takes over another's: give the "
                "cache some memory"
            )
        if kept_tokens < self._max_model_len:
            logger.warning(
                "budgetkv: --kv-host-memory %s keeps %d tokens, a prompt may have %d: longer ones "
                "are served without recall",
                self.config.host_memory,
                kept_tokens,
                self._max_model_len,
            )
