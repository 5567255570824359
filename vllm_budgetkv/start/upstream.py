"""Every vLLM symbol that we wrap, subclass, register or read, in one table, checked at start.

`check` runs when a policy is on, before anything of ours is active. What we read of vLLM's objects
and call on them stands in `upstream_reads.py`. `docs/upstream.md` is made from both
(`python -m vllm_budgetkv.start.upstream`), and `tests/start/test_upstream_versions.py` holds both
against every version below.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.start import platforms
from vllm_budgetkv.start.touchpoint import Touchpoint, resolve
from vllm_budgetkv.start.upstream_frames import FRAME_TOUCHPOINTS
from vllm_budgetkv.start.upstream_host import HOST_TOUCHPOINTS
from vllm_budgetkv.start.upstream_reads import PLAN_READS, READS, as_rows
from vllm_budgetkv.start.upstream_requests import REQUEST_TOUCHPOINTS
from vllm_budgetkv.start.upstream_stages import STAGE_TOUCHPOINTS
from vllm_budgetkv.start.upstream_stored import STORED_TOUCHPOINTS
from vllm_budgetkv.start.upstream_windows import WINDOW_TOUCHPOINTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from vllm_budgetkv.start.upstream_reads import Reads

# the one place that names them; each has its extract in `tests/start/vllm_versions`
SUPPORTED_MINORS = ("0.32", "0.33")
SUPPORTED = " or ".join(SUPPORTED_MINORS)

_ARGS = "vllm.engine.arg_utils"
_SPEC = "vllm.v1.kv_cache_interface"
_REGISTRY = "vllm.v1.kv_cache_spec_registry"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_ASYNC = "vllm.v1.core.sched.async_scheduler"
_BACKEND = "vllm.v1.attention.backend"
_ROPE = "vllm.model_executor.layers.rotary_embedding"
_WORKER = "vllm.v1.worker.gpu_worker"

# one symbol after the other, its parameters behind it, reads better than one argument per line
# fmt: off
TOUCHPOINTS = (
    Touchpoint(_ARGS, "EngineArgs.add_cli_args", "wrap", "flags: no official hook",
               ("parser",)),
    Touchpoint(_ARGS, "EngineArgs.from_cli_args", "wrap", "fold the flags into one section",
               ("cls", "args")),
    Touchpoint(_ARGS, "EngineArgs.create_engine_config", "wrap",
               "check the options against the engine's and name our scheduler and worker"),
    Touchpoint(_ARGS, "EngineArgs._set_default_max_num_seqs_and_batched_tokens_args", "wrap",
               "a batch of vLLM's choice has room for a chunk beside every decode",
               ("self", "usage_context", "model_config", "parallel_config")),

    *(
        Touchpoint("vllm.config.model", f"ModelConfig.{name}", "read",
                   "which models are refused at start")
        for name in ("use_mla", "is_hybrid", "is_attention_free", "is_encoder_decoder",
                     "is_mm_prefix_lm", "is_diffusion", "rswa_window", "uses_alibi", "has_noops",
                     "get_sliding_window", "get_head_size")
    ),
    Touchpoint("vllm.config.model_arch", "ModelArchitectureConfig.per_layer_overrides", "read",
               "layers whose heads differ are refused at start"),
    Touchpoint("vllm.config.parallel", "ParallelConfig.use_ubatching", "read",
               "a batch that runs as two is refused at start"),
    Touchpoint("vllm.v1.attention.backend", "CommonAttentionMetadata", "read",
               "a batch whose fields ask for other mathematics is refused"),

    Touchpoint("vllm.model_executor.models.interfaces",
               "IsHybrid.get_mamba_state_shape_from_config", "read",
               "a block is as long as the state of a recurrent layer", ("cls", "vllm_config")),
    Touchpoint("vllm.model_executor.models.registry", "_ModelRegistry.resolve_model_cls", "read",
               "the same", ("self", "architectures", "model_config")),
    Touchpoint("vllm.platforms.interface", "Platform._align_hybrid_block_size", "read",
               "asks our spec what a token takes, and leaves a block that is long enough alone",
               ("cls", "vllm_config", "backend_cls")),

    Touchpoint(_REGISTRY, "KVCacheSpecRegistry.register", "register", "our spec and its manager",
               ("cls", "kvcache_spec_cls", "manager_class", "uniform_type_base_spec")),
    Touchpoint(_REGISTRY, "KVCacheSpecRegistry._ensure_registered", "read",
               "registering ours first would hide the built-in specs",
               ("cls", "vllm_config")),
    Touchpoint(_SPEC, "replace_as", "read", "our spec of a layer from vLLM's"),
    Touchpoint(_SPEC, "FullAttentionSpec.max_memory_usage_bytes", "override",
               "the start-up check counts the quota",
               ("self", "vllm_config")),
    Touchpoint(_SPEC, "FullAttentionSpec.merge", "override", "keep the quota",
               ("cls", "specs")),
    Touchpoint(_SPEC, "KVCacheSpec.uses_slot_mapping", "override", "pages are ours to address"),

    Touchpoint(_MANAGER, "SingleTypeKVCacheManager.__init__", "override", "take the quota",
               ("self", "kv_cache_spec", "block_pool", "enable_caching", "kv_cache_group_id",
                "scheduler_block_size", "dcp_world_size", "pcp_world_size",
                "needs_kv_cache_zeroing", "max_admission_blocks_per_request")),
    Touchpoint(_MANAGER, "SingleTypeKVCacheManager.get_num_blocks_to_allocate", "override",
               "admission counts min(need, quota)",
               ("self", "request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens",
                "num_local_computed_tokens", "num_tokens_main_model", "apply_admission_cap",
                "prefill_end")),
    Touchpoint(_MANAGER, "SingleTypeKVCacheManager.allocate_new_blocks", "override",
               "growth stops at the quota",
               ("self", "request_id", "num_tokens", "num_tokens_main_model")),
    Touchpoint(_MANAGER, "FullAttentionManager.cache_blocks", "override",
               "compressed blocks are never published",
               ("self", "request", "num_tokens", "retention_interval", "replay_boundaries")),

    Touchpoint("vllm.v1.core.kv_cache_coordinator", "KVCacheCoordinator.cache_blocks", "replace",
               "nor is the recurrent state that follows from them",
               ("self", "request", "num_computed_tokens")),

    *FRAME_TOUCHPOINTS,
    *HOST_TOUCHPOINTS,
    *REQUEST_TOUCHPOINTS,
    *STAGE_TOUCHPOINTS,
    *STORED_TOUCHPOINTS,
    *WINDOW_TOUCHPOINTS,

    Touchpoint(_ASYNC, "AsyncScheduler.__init__", "override", "the quota, the notes, the banner",
               ("self", "args", "kwargs")),
    Touchpoint(_SCHEDULER, "Scheduler.schedule", "override", "nobody waits for the encoder yet",
               ("self", "throttle_prefills")),
    Touchpoint(_SCHEDULER, "Scheduler.get_request_counts", "override",
               "a look-ahead counts as its waiting parent",
               ("self",)),
    Touchpoint(_SCHEDULER, "Scheduler._mamba_block_aligned_split", "override",
               "a chunk ends where the request says, or waits for a step with room for it",
               ("self", "request", "num_new_tokens", "num_new_local_computed_tokens",
                "num_external_computed_tokens")),
    Touchpoint(_SCHEDULER, "Scheduler._try_schedule_encoder_inputs", "override",
               "what the encoder has no room for waits too",
               ("self", "request", "num_computed_tokens", "num_new_tokens",
                "encoder_compute_budget", "shift_computed_tokens")),
    Touchpoint("vllm.v1.core.encoder_cache_manager", "EncoderCacheManager.free", "read",
               "a chunk that waits holds no item back from others", ("self", "request")),
    Touchpoint("vllm.v1.core.encoder_cache_manager", "EncoderCacheManager.__init__", "read",
               "cache_size: how many embeddings one request may need at once",
               ("self", "cache_size")),
    Touchpoint(_SCHEDULER, "Scheduler.add_request", "override", "hold for look-ahead",
               ("self", "request")),
    Touchpoint(_SCHEDULER, "Scheduler.finish_requests", "override",
               "cancel a look-ahead with its parent",
               ("self", "request_ids", "finished_status")),
    Touchpoint(_SCHEDULER, "Scheduler._free_request", "override",
               "release the parent of a look-ahead",
               ("self", "request", "delay_free_blocks")),
    Touchpoint(_SCHEDULER, "Scheduler.update_from_output", "override",
               "look-ahead output reaches no client",
               ("self", "scheduler_output", "model_runner_output")),
    Touchpoint(_SCHEDULER, "Scheduler._reject_on_encoder_cache_embed_mismatch", "read",
               "fills encoder_cache_mismatch_reqs: such requests, and sessions, end with an error"),

    Touchpoint(_BACKEND, "AttentionBackend.supported_dtypes", "override", "those of the kernels"),
    Touchpoint(_BACKEND, "AttentionBackend.get_name", "override", "our name", ()),
    Touchpoint(_BACKEND, "AttentionBackend.get_impl_cls", "override", "our attention", ()),
    Touchpoint(_BACKEND, "AttentionBackend.get_builder_cls", "override", "our metadata", ()),
    Touchpoint(_BACKEND, "AttentionBackend.get_supported_kernel_block_sizes", "override",
               "those of the page layout",
               ("kv_cache_spec",)),
    Touchpoint(_BACKEND, "AttentionBackend.get_supported_head_sizes", "override",
               "those of the page layout",
               ("cls",)),
    Touchpoint(_BACKEND, "AttentionBackend.supported_kv_cache_layouts", "override",
               "one buffer, block outermost",
               ("cls",)),
    Touchpoint(_BACKEND, "AttentionBackend.customize_spec", "override", "our spec for every layer",
               ("cls", "spec")),
    Touchpoint(_BACKEND, "AttentionBackend.supports_sink", "override", "learned ones", ("cls",)),
    Touchpoint(_BACKEND, "AttentionBackend.supports_mm_prefix", "override",
               "pictures whose tokens attend both ways", ("cls",)),
    Touchpoint(_BACKEND, "AttentionBackend.supports_kv_connector", "override",
               "a connector would read pages that have moved",
               ("cls",)),
    Touchpoint(_BACKEND, "AttentionMetadataBuilder.__init__", "override", "bound by the worker",
               ("self", "kv_cache_spec", "layer_names", "vllm_config", "device")),
    Touchpoint(_BACKEND, "AttentionMetadataBuilder.reorder_batch_threshold", "override",
               "decode rows stand first"),
    Touchpoint(_BACKEND, "AttentionMetadataBuilder._cudagraph_support", "override",
               "decode steps can be captured"),
    Touchpoint(_BACKEND, "AttentionMetadataBuilder.build_for_cudagraph_capture", "override",
               "a step of no request yet",
               ("self", "common_attn_metadata")),
    Touchpoint(_BACKEND, "AttentionMetadataBuilder.build", "override",
               "rows of the batch to request slots",
               ("self", "common_prefix_len", "common_attn_metadata", "fast_build")),
    Touchpoint(_BACKEND, "AttentionImpl.__init__", "override", "refuse what the kernels cannot do",
               ("self", "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes",
                "sliding_window", "kv_cache_dtype", "logits_soft_cap", "attn_type",
                "kv_sharing_target_layer_name")),
    Touchpoint(_BACKEND, "AttentionImpl.forward", "override", "append, attend, compress",
               ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output",
                "output_scale", "output_block_scale")),
    Touchpoint("vllm.v1.attention.backends.registry", "register_backend", "register",
               "our backend while our worker loads its model",
               ("backend", "class_path", "is_mamba")),
    Touchpoint("vllm.v1.attention.backends.registry", "AttentionBackendEnum.clear_override",
               "register", "only that model gets our backend",
               ("self",)),
    Touchpoint("vllm.v1.attention.backends.registry", "AttentionBackendEnum.CUSTOM", "register",
               "the slot of our backend on a GPU; on a CPU it is CPU_ATTN's"),
    Touchpoint("vllm.v1.attention.selector", "_cached_get_attn_backend", "read",
               "its cache must not outlive the registration"),

    Touchpoint(_WORKER, "Worker", "subclass", "the worker of the engine"),
    Touchpoint("vllm.v1.worker.cpu_worker", "CPUWorker", "subclass", "the same on a CPU",
               device="cpu"),
    Touchpoint(_WORKER, "Worker.load_model", "override", "our backend while the model loads",
               ("self", "load_dummy_weights")),
    Touchpoint(_WORKER, "Worker.get_kv_cache_spec", "override",
               "refuse layers whose cache is of another kind",
               ("self",)),
    Touchpoint(_WORKER, "Worker.determine_available_memory", "override",
               "refuse a pool below a quota in terms of the quota",
               ("self",)),
    Touchpoint(_WORKER, "Worker.initialize_from_config", "override",
               "our cache over the engine's buffer",
               ("self", "kv_cache_config")),
    Touchpoint(_WORKER, "Worker.compile_or_warm_up_model", "override",
               "compile our kernels too; no warm-up is a client's request",
               ("self",)),
    Touchpoint(_WORKER, "Worker.execute_model", "override",
               "see each step's requests before the model runs",
               ("self", "scheduler_output")),
    Touchpoint("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.gather_batch_req_state",
               "replace", "a chunk of one token is no decode, so no graph serves it (runner V2)",
               ("self", "scheduler_output", "dummy_run")),
    Touchpoint("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._is_uniform_decode", "replace",
               "the same (runner V1)",
               ("max_num_scheduled_tokens", "uniform_decode_query_len", "num_tokens", "num_reqs",
                "force_uniform_decode")),
    Touchpoint("vllm.v1.worker.gpu.model_states.mamba_hybrid",
               "MambaHybridModelState.prepare_attn", "replace",
               "rows to requests where metadata do not say it: recurrent layers (runner V2)",
               ("self", "input_batch", "cudagraph_mode", "block_tables", "slot_mappings",
                "attn_groups", "kv_cache_config", "for_capture", "ubatch_idx",
                "model_specific_attn_metadata")),
    Touchpoint("vllm.forward_context", "set_forward_context", "read",
               "run the model on a few tokens at known positions, without compiling it",
               ("attn_metadata", "vllm_config", "num_tokens", "num_tokens_across_dp",
                "cudagraph_runtime_mode", "batch_descriptor", "ubatch_slices", "slot_mapping",
                "skip_compiled", "is_padding")),
    Touchpoint("vllm.v1.worker.lora_model_runner_mixin",
               "LoRAModelRunnerMixin.maybe_dummy_run_with_lora", "read", "the same with LoRA",
               ("self", "lora_config", "num_scheduled_tokens", "num_sampled_tokens", "remove_lora",
                "num_active_loras", "mapping_type")),
    Touchpoint("vllm.model_executor.models.interfaces", "requires_raw_input_tokens", "read",
               "the same for models that read embeddings",
               ("model",)),
    Touchpoint("vllm.model_executor.layers.mamba.abstract", "MambaBase", "read",
               "layers with recurrent state, which are silenced in it"),
    Touchpoint("vllm.config", "ModelConfig.uses_mrope", "read", "the axes of positions"),
    Touchpoint("vllm.config", "ModelConfig.mrope_num_dims", "read", "how many they are"),
    Touchpoint(_ROPE + ".base", "RotaryEmbeddingBase.__init__", "read",
               "cos_sin_cache, is_neox_style: how queries may turn",
               ("self", "head_size", "rotary_dim", "max_position_embeddings", "base",
                "is_neox_style", "dtype", "init_cache")),
    Touchpoint(_ROPE, "Phi3LongRoPEScaledRotaryEmbedding.__init__", "read",
               "long_short_cos_sin_cache, use_long_rope: the table in use",
               ("self", "head_size", "rotary_dim", "max_position_embeddings",
                "original_max_position_embeddings", "base", "is_neox_style", "dtype",
                "short_factor", "long_factor", "short_mscale", "long_mscale")),
    Touchpoint("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.sample_tokens", "replace",
               "seeds on a CPU: a chunk draws nothing from a request's generator (runner V1)",
               ("self", "grammar_output")),
    Touchpoint("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._is_all_reqs_chunked_prefill",
               "read", "discard_request_mask: the rows whose token is thrown away (runner V1)",
               ("self",)),
    Touchpoint("vllm.v1.worker.gpu_input_batch", "InputBatch._make_sampling_metadata", "read",
               "the sampler gets the dict `generators` itself, by row (runner V1)",
               ("self",)),
)
# fmt: on


def check() -> None:
    """Compare the installed vLLM with the table.

    Raises:
        RuntimeError: vLLM's version or one of the symbols is not what we were written for.
    """
    import vllm

    if minor_of(vllm.__version__) not in SUPPORTED_MINORS:
        raise RuntimeError(
            f"vllm-budgetkv supports vLLM {SUPPORTED}, found {vllm.__version__}: install one of "
            "them or start without --kv-policy"
        )
    found = list(problems())
    if found:
        raise RuntimeError(
            "this vLLM differs from the one that vllm-budgetkv was written for; start without "
            "--kv-policy or install a matching version:\n  " + "\n  ".join(found)
        )


def minor_of(version: str) -> str:
    """`0.32` of `0.32.1+cpu`."""
    return ".".join(version.split(".")[:2])


def problems() -> Iterator[str]:
    """What the installed vLLM has otherwise than both tables say, for the device it runs on."""
    from vllm.platforms import current_platform

    device = platforms.known(current_platform)
    for point in TOUCHPOINTS:
        if point.device in (None, device and device.device) and (problem := point.problem()):
            yield problem
    yield from problems_of(READS)


def problems_of(table: Iterable[Reads]) -> Iterator[str]:
    """What of these the installed vLLM has not, or calls otherwise."""
    for reads in table:
        try:
            cls = resolve(reads.module, reads.name)
        except (ImportError, AttributeError) as error:
            yield f"{reads.place}: missing ({error})"
        else:
            yield from reads.problems(cls)


def wrap(name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method of a class by `wrapper(original, ...)`, once however often called.

    A class method stays one: its wrapper gets the class after the original.

    Raises:
        KeyError: the method is not in the table.
    """
    point = {p.name: p for p in TOUCHPOINTS if p.how == "wrap"}[name]
    class_name, method_name = name.split(".")
    owner = getattr(importlib.import_module(point.module), class_name)
    found = inspect.getattr_static(owner, method_name)
    kind = type(found) if isinstance(found, classmethod | staticmethod) else None
    original = found.__func__ if kind else found
    if getattr(original, "_budgetkv_wraps", None) == name:
        return

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    replacement._budgetkv_wraps = name  # type: ignore[attr-defined]
    setattr(owner, method_name, kind(replacement) if kind else replacement)


def replace_in(owner: object, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method of one object of vLLM's by `wrapper(original, ...)`.

    Raises:
        KeyError: the method is not in the table.
    """
    point = {p.name: p for p in TOUCHPOINTS if p.how == "replace"}[name]
    method_name = point.name.split(".")[-1]
    setattr(owner, method_name, functools.partial(wrapper, getattr(owner, method_name)))


@contextmanager
def replaced_in(owner: object, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """The same inside, of an object or of a function in a module that imported it."""
    attribute = name.split(".")[-1]
    original = getattr(owner, attribute)
    replace_in(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, attribute, original)


def as_markdown() -> str:
    """The table as the text of `docs/upstream.md`."""
    lines = [
        "# What we touch in vLLM",
        "",
        "Made from `vllm_budgetkv/start/upstream.py` and `upstream_reads.py`; checked at start. "
        f"Written for vLLM {SUPPORTED}.",
        "",
        "## Overridden, wrapped, registered",
        "",
        "| symbol | how | why |",
        "|---|---|---|",
    ]
    lines += [f"| `{p.place}` | {p.how} | {p.why} |" for p in TOUCHPOINTS]
    lines += ["", "## Fields that we read or set, methods that we call", "", *as_rows(READS)]
    lines += [
        "",
        "## What `vllm-budgetkv plan` and `inspect` read beside them",
        "",
        *as_rows(PLAN_READS),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
