"""Fields that we read or set on vLLM's objects, and methods that we call there, by class.

`upstream.py` lists what we override, wrap and register. What stands here would otherwise be missed
only in the middle of a request; `upstream.check` looks for it at start.
"""

from __future__ import annotations

import dis
import inspect
from dataclasses import dataclass
from itertools import pairwise
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


@dataclass(frozen=True)
class Reads:
    """What we use of one vLLM class.

    Args:
        module: module that defines it.
        name: the class.
        why: what we need it for.
        members: fields as `name`; methods as `name(parameter, ...)` with the parameters that we
            pass, by position or name. `(...)` alone is the class called.
    """

    module: str
    name: str
    why: str
    members: tuple[str, ...]

    @property
    def place(self) -> str:
        return f"{self.module}.{self.name}"

    def calls(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Methods that we call and the parameters that we pass."""
        for member in self.members:
            name, is_call, rest = member.partition("(")
            if is_call:
                passed = tuple(p.strip() for p in rest.removesuffix(")").split(",") if p.strip())
                yield name or "__init__", passed

    def fields(self) -> Iterator[str]:
        yield from (member for member in self.members if "(" not in member)

    def problems(self, cls: type) -> Iterator[str]:
        """What `cls`, the class of this name, has no more or calls otherwise."""
        for name in self.fields():
            if not has_member(cls, name):
                yield f"{self.place}.{name}: missing"
        for name, passed in self.calls():
            function = getattr(cls, name, None)
            if function is None:
                yield f"{self.place}.{name}: missing"
                continue
            parameters = inspect.signature(inspect.unwrap(function)).parameters
            if wrong := call_problem(passed, _required(parameters)):
                yield f"{self.place}.{name}: {wrong}"


def _required(parameters: Mapping[str, inspect.Parameter]) -> dict[str, bool]:
    return {
        name: parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        for name, parameter in parameters.items()
    }


def call_problem(passed: tuple[str, ...], required: Mapping[str, bool]) -> str | None:
    """Why a call that passes `passed` does not fit a function; None if it does.

    Args:
        passed: names of what the call passes, without the object itself.
        required: parameters of the function; whether a call must pass them.
    """
    if unknown := [name for name in passed if name not in required]:
        return f"takes no {', '.join(unknown)}"
    missing = [
        name
        for name, must in required.items()
        if must and name not in passed and name not in ("self", "cls")
    ]
    return f"wants {', '.join(missing)} too" if missing else None


def has_member(cls: type, name: str) -> bool:
    """Whether objects of `cls` have `name`: in a class body, annotated there, or set on `self`."""
    return any(
        name in vars(base)
        or name in inspect.get_annotations(base)
        or any(_sets_on_self(attribute, name) for attribute in vars(base).values())
        for base in cls.__mro__
    )


def _sets_on_self(attribute: Any, name: str) -> bool:
    function = inspect.unwrap(getattr(attribute, "fget", None) or attribute)
    if not isinstance(function, FunctionType) or name not in function.__code__.co_names:
        return False
    # 3.13 loads two variables at once: the object is the last of them
    return any(
        instruction.opname == "STORE_ATTR"
        and instruction.argval == name
        and (before.argval[-1] if isinstance(before.argval, tuple) else before.argval) == "self"
        for before, instruction in pairwise(dis.get_instructions(function))
    )


def as_rows(table: Iterable[Reads]) -> Iterator[str]:
    """The lines of a table of `docs/upstream.md`."""
    yield from ("| class | members | why |", "|---|---|---|")
    for reads in table:
        members = ", ".join(f"`{member}`" for member in reads.members)
        yield f"| `{reads.place}` | {members} | {reads.why} |"


# fmt: off
READS = (
    Reads("vllm.engine.arg_utils", "EngineArgs", "the options, before vLLM derives the rest", (
        "additional_config", "block_size", "long_prefill_token_threshold", "max_num_batched_tokens",
        "max_num_seqs")),
    Reads("vllm.config", "VllmConfig", "what the engine is; where ours is named", (
        "additional_config", "attention_config", "cache_config", "compilation_config",
        "ec_transfer_config", "is_mm_encoder_only", "kv_transfer_config", "lora_config",
        "model_config", "parallel_config", "scheduler_config", "speculative_config",
        "use_v2_model_runner")),
    Reads("vllm.config", "ModelConfig", "what is not served; sizes of the quota", (
        "architecture", "architectures", "attention_chunk_size", "disable_sliding_window", "dtype",
        "enable_prompt_embeds", "hf_config", "hf_text_config", "is_attention_free",
        "is_encoder_decoder", "is_hybrid", "is_mm_prefix_lm", "max_model_len",
        "model_arch_config", "multimodal_config", "registry", "runner_type", "served_model_name",
        "use_mla",
        "get_head_size()", "get_num_kv_heads(parallel_config)",
        "get_num_layers(parallel_config)", "get_sliding_window()",
        "get_total_num_hidden_layers()", "get_vocab_size()")),
    Reads("vllm.config", "CacheConfig", "tokens of a page and of a block; what is not served", (
        "block_size", "cache_dtype", "enable_mamba_shared_prefix_checkpoint",
        "enable_prefix_caching", "kv_cache_dtype_skip_layers",
        "kv_cache_memory_bytes", "kv_offloading_size",
        "kv_sharing_fast_prefill", "mamba_block_size", "mamba_cache_mode", "num_gpu_blocks",
        "num_gpu_blocks_override", "prefix_caching_hash_algo",
        "prefix_match_unit", "user_specified_block_size")),
    Reads("vllm.v1.kv_cache_interface", "MambaSpec", "what the state of a layer takes", (
        "page_size_bytes", "max_memory_usage_bytes(vllm_config)",
        "block_size", "dtypes", "shapes")),
    *(
        Reads("vllm.v1.kv_cache_interface", name, "what the windows of a request take", (
            "block_size", "page_size_bytes", "max_memory_usage_bytes(vllm_config)"))
        for name in ("SlidingWindowSpec", "ChunkedLocalAttentionSpec")
    ),
    Reads("vllm.config", "MultiModalConfig", "video that is pruned or whole; equal pictures", (
        "enable_mm_embeds", "mm_processor_cache_gb", "mm_processor_cache_type",
        "video_pruning_rate", "is_multimodal_pruning_enabled()")),
    Reads("vllm.config", "LoRAConfig", "towers that are adapted", (
        "enable_tower_connector_lora",)),
    Reads("vllm.config.multimodal", "VideoDummyOptions", "a small video", (
        "height", "num_frames", "width")),
    Reads("vllm.config", "ParallelConfig", "our worker's name; workers; what is not served", (
        "data_parallel_index", "data_parallel_rank_local", "data_parallel_size",
        "data_parallel_size_local", "distributed_executor_backend", "local_engines_only",
        "decode_context_parallel_size", "pipeline_parallel_size",
        "prefill_context_parallel_size", "rank", "tensor_parallel_size", "worker_cls",
        "world_size")),
    Reads("vllm.config", "SchedulerConfig", "our scheduler's name; chunks; what is not served", (
        "async_scheduling", "disable_chunked_mm_input", "disable_hybrid_kv_cache_manager",
        "enable_chunked_prefill", "long_prefill_token_threshold",
        "long_prefill_token_threshold_adaptive", "max_num_batched_tokens",
        "max_num_scheduled_tokens", "max_num_seqs", "scheduler_cls")),
    Reads("vllm.config", "AttentionConfig", "select our backend on a GPU", (
        "backend", "backend_per_kind", "hisparse_config")),
    Reads("vllm.config", "CompilationConfig", "the attention layers by name; eager stages", (
        "mode", "static_forward_context")),
    Reads("vllm.platforms.interface", "Platform", "which worker and kernels", (
        "device_type", "has_device_capability(capability)", "is_cpu()", "is_cuda()")),

    Reads("vllm.multimodal.inputs", "MultiModalFeatureSpec", "where pictures and frames are", (
        "data", "identifier", "mm_hash", "mm_position", "modality")),
    Reads("vllm.multimodal.inputs", "PlaceholderRange", "the same", (
        "is_embed", "length", "offset", "extract_embeds_range()", "get_num_embeds()")),
    Reads("vllm.multimodal.inputs", "MultiModalFieldElem", "the grid of a frame", (
        "data", "field")),
    Reads("vllm.multimodal.encoder_budget", "MultiModalBudget", "what the encoder takes", (
        "encoder_cache_size", "encoder_compute_budget", "mm_max_items_per_batch",
        "mm_max_toks_per_item", "processor", "(vllm_config, mm_registry, enable_cache)")),
    Reads("vllm.multimodal.processing", "BaseMultiModalProcessor", "a small video", (
        "get_dummy_inputs(seq_len, mm_counts, mm_options)", "apply(inputs, timing_ctx)")),
    Reads("vllm.multimodal.processing.context", "TimingContext", "the same", ("enabled",)),

    Reads("vllm.v1.request", "Request", "what is noted of it; look-ahead", (
        "all_token_ids", "arrival_time", "block_hashes", "client_index", "lora_request",
        "max_tokens", "mm_features",
        "num_computed_tokens", "num_preemptions", "num_prompt_tokens", "num_tokens", "priority",
        "prompt_token_ids",
        "request_id", "resumable", "sampling_params", "skip_reading_prefix_cache", "status",
        "(request_id, client_index, prompt_token_ids, sampling_params, pooling_params, "
        "arrival_time, lora_request, priority)")),
    Reads("vllm.v1.request", "RequestStatus", "which look-aheads run", ("RUNNING",)),
    Reads("vllm.sampling_params", "SamplingParams", "a look-ahead's one token", (
        "detokenize", "extra_args", "max_tokens", "stop", "temperature")),
    Reads("vllm.v1.engine", "EngineCoreRequest", "what it asks for, and how long it is", (
        "mm_features", "prompt_embeds", "prompt_token_ids", "resumable", "sampling_params")),
    Reads("vllm.v1.engine.input_processor", "InputProcessor", "which items are too long", (
        "mm_encoder_cache_size", "renderer", "supports_mm_inputs", "vllm_config")),
    Reads("vllm.renderers.base", "BaseRenderer", "a refused picture may be sent again", (
        "mm_processor_cache",)),
    Reads("vllm.multimodal.cache.base", "BaseMultiModalProcessorCache", "the same", (
        "invalidate(mm_hash)",)),
    Reads("vllm.v1.engine.output_processor", "OutputProcessor", "requests that may end there", (
        "request_states",)),
    Reads("vllm.v1.engine.output_processor", "OutputProcessorOutput", "those that ended there", (
        "reqs_to_abort",)),
    Reads("vllm.v1.engine", "EngineCoreOutput", "what it says of a request that ended", (
        "finish_reason", "kv_transfer_params", "new_token_ids")),
    Reads("vllm.v1.outputs", "ModelRunnerOutput", "what was counted of prompts", (
        "kv_connector_output",)),
    Reads("vllm.v1.outputs", "KVConnectorOutput", "the same", (
        "kv_connector_worker_meta",)),

    Reads("vllm.v1.kv_cache_interface", "FullAttentionSpec", "our spec of a layer", (
        "attention_chunk_size", "block_size", "dtype", "head_size", "head_size_v",
        "kv_quant_mode", "page_size_bytes", "sliding_window", "state_content_bytes")),
    Reads("vllm.v1.kv_cache_interface", "KVQuantMode", "how keys and values are stored", (
        "FP8_PER_TENSOR", "NONE")),
    Reads("vllm.v1.kv_cache_interface", "KVCacheConfig", "blocks of the pool, groups of layers", (
        "kv_cache_groups", "num_blocks")),
    Reads("vllm.v1.kv_cache_interface", "KVCacheGroupSpec", "our layers, what others take", (
        "kv_cache_spec", "layer_names")),
    Reads("vllm.v1.kv_cache_layout", "KVCacheLayout", "one buffer, block outermost", ("BLHNC",)),
    Reads("vllm.v1.core.single_type_kv_cache_manager", "FullAttentionManager",
          "blocks that a request holds", ("req_to_blocks",)),
    Reads("vllm.v1.core.kv_cache_manager", "KVCacheManager", "find our manager; no hit", (
        "coordinator", "empty_kv_cache_blocks")),
    Reads("vllm.v1.core.kv_cache_coordinator", "KVCacheCoordinator", "the same", (
        "single_type_managers",)),

    Reads("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", "requests, and those to end", (
        "connector", "connector_prefix_cache_stats", "encoder_cache_manager",
        "encoder_cache_mismatch_reqs", "finished_req_ids",
        "finished_req_ids_dict", "kv_cache_config", "kv_cache_manager", "log_stats",
        "max_model_len",
        "max_num_encoder_input_tokens", "need_mamba_block_aligned_split", "requests",
        "scheduler_config", "use_pp", "vllm_config")),
    Reads("vllm.v1.core.sched.output", "SchedulerOutput", "what the worker follows", (
        "finished_req_ids", "kv_connector_metadata", "num_scheduled_tokens", "preempted_req_ids",
        "scheduled_cached_reqs", "scheduled_encoder_inputs",
        "scheduled_new_reqs")),
    Reads("vllm.v1.core.sched.output", "NewRequestData", "a request that is admitted", (
        "block_ids", "mm_features", "num_computed_tokens", "prompt_len", "prompt_token_ids",
        "req_id", "sampling_params")),
    Reads("vllm.v1.core.sched.output", "CachedRequestData", "requests that grow or resume", (
        "new_block_ids", "num_computed_tokens", "req_ids", "resumed_req_ids")),
    Reads("vllm.v1.engine", "EngineCoreOutputs", "take out what a look-ahead says", ("outputs",)),
    Reads("vllm.v1.engine", "EngineCoreOutput", "the same", ("request_id",)),

    Reads("vllm.v1.attention.backend", "CommonAttentionMetadata", "rows of the batch", (
        "block_table_tensor", "causal", "max_query_len", "max_seq_len", "mm_req_doc_ranges",
        "num_actual_tokens", "num_reqs", "query_start_loc", "query_start_loc_cpu", "req_idx",
        "seq_lens", "slot_mapping")),
    Reads("vllm.v1.attention.backend", "AttentionCGSupport", "decode steps can be captured", (
        "UNIFORM_SINGLE_TOKEN_DECODE",)),
    Reads("vllm.v1.attention.backend", "AttentionType", "no other is served", ("DECODER",)),
    Reads("vllm.v1.attention.backend", "MultipleOf", "page sizes", ("base",)),
    Reads("vllm.v1.attention.backends.registry", "AttentionBackendEnum", "slots of our backend", (
        "CPU_ATTN", "TRITON_ATTN_DIFFKV", "get_class()", "get_path()")),
    Reads("vllm.model_executor.layers.attention", "Attention", "the layer behind a call", (
        "impl", "kv_cache", "layer_name")),
    Reads("vllm.model_executor.layers.rotary_embedding.base", "RotaryEmbedding",
          "turn stored queries", ("is_neox_style",)),

    Reads("vllm.model_executor.models.interfaces", "SupportsPP", "noise for a later stage", (
        "make_empty_intermediate_tensors",)),
    Reads("vllm.sequence", "IntermediateTensors", "the same", ("tensors",)),

    Reads("vllm.v1.worker.gpu_worker", "Worker", "model, rank and runner", (
        "model_config", "model_runner", "rank", "use_v2_model_runner", "vllm_config")),
    Reads("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "builders, rows, seeds (V1)", (
        "attn_groups", "device", "discard_request_mask", "input_batch", "lora_config",
        "mm_budget", "requests", "supports_mm_inputs", "get_model()")),
    Reads("vllm.v1.worker.gpu_input_batch", "CachedRequestState", "items of a request (V1)", (
        "mm_features",)),
    Reads("vllm.v1.worker.gpu_input_batch", "InputBatch", "rows to requests, seeds (runner V1)", (
        "generators", "req_ids")),
    Reads("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "builders, rows (runner V2)", (
        "attn_groups", "device", "lora_config", "model_state", "req_states", "supports_mm_inputs",
        "get_model()")),
    Reads("vllm.v1.worker.gpu.input_batch", "InputBatch", "the same", ("req_ids",)),
    Reads("vllm.v1.worker.gpu.states", "RequestState", "rows to requests (runner V2)", (
        "index_to_req_id",)),
    Reads("vllm.v1.worker.utils", "AttentionGroup", "bind the builders", (
        "get_metadata_builder()",)),
)

# what `vllm-budgetkv plan` and `inspect` need beside them; no start depends on it
PLAN_READS = (
    Reads("vllm.engine.arg_utils", "EngineArgs", "the engine of a `vllm serve` line", (
        "decode_context_parallel_size", "enforce_eager", "gpu_memory_utilization",
        "kv_cache_dtype", "kv_cache_dtype_skip_layers", "kv_cache_memory_bytes",
        "max_model_len", "max_num_scheduled_tokens", "num_gpu_blocks_override",
        "pipeline_parallel_size", "prefill_context_parallel_size", "skip_mm_profiling",
        "tensor_parallel_size", "create_model_config()")),
    Reads("vllm.entrypoints.llm", "LLM", "ask an engine of its own", (
        "chat(messages, sampling_params, use_tqdm)",)),
    Reads("vllm.utils.argparse_utils", "FlexibleArgumentParser", "read such a line", (
        "parse_args(args)",)),
    Reads("vllm.config", "ModelConfig", "sizes of weights and activations", (
        "model", "quantization", "revision", "supports_multimodal_inputs",
        "get_hidden_size()", "get_inputs_embeds_size()",
        "get_num_attention_heads(parallel_config)")),
    Reads("vllm.config", "CacheConfig", "what vLLM takes of a GPU", ("gpu_memory_utilization",)),
    Reads("vllm.config", "SchedulerConfig", "the batch", (
        "DEFAULT_MAX_NUM_BATCHED_TOKENS", "is_encoder_decoder", "max_model_len")),
    Reads("vllm.v1.kv_cache_interface", "FullAttentionSpec", "a page of stock vLLM", (
        "num_kv_heads",)),
)
# fmt: on
