"""What host memory touches in vLLM: the scheduler's half of a KV connector, hashes of blocks."""

from __future__ import annotations

from vllm_budgetkv.start.touchpoint import Touchpoint

_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager"
_SCHEDULER = "vllm.v1.core.sched.scheduler"

# fmt: off
HOST_TOUCHPOINTS = (
    Touchpoint(_MANAGER, "SingleTypeKVCacheManager.allocate_external_computed_blocks", "override",
               "what host memory keeps takes no blocks beside the quota",
               ("self", "request_id", "num_local_computed_tokens", "num_external_computed_tokens",
                "record_for_zeroing")),
    Touchpoint(_CONNECTOR, "KVConnectorBase_V1.__init__", "override", "the prompts in host memory",
               ("self", "vllm_config", "role", "kv_cache_config")),
    Touchpoint(_CONNECTOR, "KVConnectorBase_V1.get_num_new_matched_tokens", "override",
               "what a prompt finds in host memory",
               ("self", "request", "num_computed_tokens")),
    Touchpoint(_CONNECTOR, "KVConnectorBase_V1.update_state_after_alloc", "override",
               "an admitted request gets its place there",
               ("self", "request", "blocks", "num_external_tokens")),
    Touchpoint(_CONNECTOR, "KVConnectorBase_V1.build_connector_meta", "override",
               "the worker is told, and what it writes can be found in the next step",
               ("self", "scheduler_output")),
    Touchpoint(_CONNECTOR, "KVConnectorBase_V1.request_finished", "override",
               "its place may be taken",
               ("self", "request", "block_ids")),
    Touchpoint(_CONNECTOR, "KVConnectorBase_V1.reset_cache", "override",
               "nothing of old weights is found",
               ("self",)),
    *(
        Touchpoint(_CONNECTOR, f"KVConnectorBase_V1.{name}", "override",
                   "abstract there; our cache reads and writes host memory itself",
                   ("self", *parameters))
        for name, parameters in {
            "start_load_kv": ("forward_context", "kwargs"),
            "wait_for_layer_load": ("layer_name",),
            "save_kv_layer": ("layer_name", "kv_layer", "attn_metadata", "kwargs"),
            "wait_for_save": (),
        }.items()
    ),
    Touchpoint(_CONNECTOR, "KVConnectorBase_V1._cache_hit_source", "override",
               "vllm:prompt_tokens_cached_by_source says host"),
    Touchpoint("vllm.v1.metrics.cache_hit_source", "CacheHitSource.HOST", "read", "the same"),
    Touchpoint(_CONNECTOR, "KVConnectorMetadata", "subclass", "the places of a step"),
    Touchpoint(_CONNECTOR, "KVConnectorRole.SCHEDULER", "read", "there is no worker's half"),
    Touchpoint("vllm.config", "KVTransferConfig", "read", "without one there is no connector"),
    Touchpoint("vllm.v1.core.kv_cache_utils", "generate_block_hash_extra_keys", "read",
               "name the end of an item inside a block",
               ("request", "start_token_idx", "end_token_idx", "start_mm_idx")),
    Touchpoint("vllm.v1.core.kv_cache_utils", "hash_block_tokens", "read", "the same",
               ("hash_function", "parent_block_hash", "curr_block_token_ids", "extra_keys")),
    Touchpoint("vllm.utils.hashing", "get_hash_fn_by_name", "read", "the same",
               ("hash_fn_name",)),
    Touchpoint("vllm.v1.metrics.stats", "PrefixCacheStats", "read",
               "vllm:external_prefix_cache_queries and _hits count host memory"),
    Touchpoint(_SCHEDULER, "Scheduler._get_local_prefix_cache_hit", "override",
               "a request that compresses reads no cached block, but may read host memory",
               ("self", "request", "...")),
)
# fmt: on
