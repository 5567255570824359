"""What the plugin does not serve: refused at start, with the reason and the option to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_budgetkv.start import pictures, platforms, refused_models, stages, stored
from vllm_budgetkv.start.groups import groups_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.config import ModelConfig, VllmConfig

    from vllm_budgetkv.start.config import BudgetConfig
    from vllm_budgetkv.start.engine_config import EngineConfig

# the only one in which any head of any layer may use any page of a block
KV_CACHE_LAYOUT = "BLHNC"


def check(vllm_config: VllmConfig, config: BudgetConfig) -> None:
    """Refuse an engine configuration that the plugin cannot serve.

    Where no option makes the model work, no option is named; vLLM may have set some itself.

    Raises:
        ValueError: names every reason and the option to change.
    """
    model = vllm_config.model_config
    reasons = [*_platform(config), *of_model(vllm_config)]
    if model.runner_type == "generate" and not refused_models.dead_ends(model):
        reasons += [
            *_media(vllm_config),
            *_cache(vllm_config),
            *_connections(vllm_config),
            *_scheduler(vllm_config, config),
            *_beside(vllm_config, config),
            *pictures.reasons(vllm_config, config),
            *stages.reasons(vllm_config, config),
        ]
    refuse(reasons, config.policy)


def refuse(reasons: list[str], policy: str) -> None:
    """Raise unless there is no reason to.

    Raises:
        ValueError: names every reason.
    """
    if reasons:
        raise ValueError(
            f"--kv-policy {policy} cannot serve this configuration:\n  - " + "\n  - ".join(reasons)
        )


def of_model(engine: EngineConfig) -> list[str]:
    """Why a model is refused, or how it is spread over devices; empty if it may be served."""
    model = engine.model_config
    reasons = [*_runner(model), *refused_models.dead_ends(model)]
    if model.runner_type == "generate" and not refused_models.dead_ends(model):
        reasons += [*refused_models.sliding_window(model), *_parallel(engine)]
        reasons += stored.refusals(engine)
    return reasons


def _platform(config: BudgetConfig) -> Iterator[str]:
    from vllm.platforms import current_platform

    platform = platforms.known(current_platform)
    if platform is None:
        yield (
            f"there are no kernels for device {current_platform.device_type!r}: run on a CPU or "
            "an NVIDIA GPU, or start without --kv-policy"
        )
    elif not platform.is_proven and not config.unproven_device:
        yield (
            f"no version was fully tested on device {platform.device!r} yet: run on a CPU, start "
            "without --kv-policy, or try it with --kv-unproven-device"
        )


def _runner(model: ModelConfig) -> Iterator[str]:
    if model.runner_type == "generate":
        return
    if model.registry.is_text_generation_model(model.architectures, model):
        yield f"runner {model.runner_type!r} keeps no growing cache: use --runner generate"
    else:
        yield "the model writes no text, so its cache does not grow: start without --kv-policy"


def _media(vllm_config: VllmConfig) -> Iterator[str]:
    from vllm.platforms import current_platform

    media = vllm_config.model_config.multimodal_config
    if vllm_config.is_mm_encoder_only:
        yield "an engine that runs encoders alone keeps no cache: remove --mm-encoder-only"
    if media is not None and media.is_multimodal_pruning_enabled() and current_platform.is_cpu():
        yield (
            f"vLLM prunes no video on a CPU: remove --video-pruning-rate {media.video_pruning_rate}"
        )


def _parallel(engine: EngineConfig) -> Iterator[str]:
    parallel = engine.parallel_config
    for name, flag in (
        ("decode_context_parallel_size", "--decode-context-parallel-size"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
    ):
        if (size := getattr(parallel, name)) > 1:
            yield f"{flag} {size} is not supported: set it to 1"
    if parallel.use_ubatching:
        yield "a batch must run as one: remove --enable-dbo and --ubatch-size"


def _cache(vllm_config: VllmConfig) -> Iterator[str]:
    from vllm import envs

    cache = vllm_config.cache_config
    yield from stored.of_device(vllm_config)
    if cache.kv_sharing_fast_prefill:
        yield "layers that share their cache are not supported: remove --kv-sharing-fast-prefill"
    if cache.prefix_match_unit not in (None, cache.block_size):
        yield (
            f"cached prefixes end with a block of {cache.block_size} tokens: remove "
            f"--prefix-match-unit {cache.prefix_match_unit}"
        )
    if envs.VLLM_KV_CACHE_LAYOUT not in (None, KV_CACHE_LAYOUT):
        yield (
            f"the cache cannot be laid out as {envs.VLLM_KV_CACHE_LAYOUT}: unset "
            "VLLM_KV_CACHE_LAYOUT"
        )


def _connections(vllm_config: VllmConfig) -> Iterator[str]:
    from vllm import envs

    if vllm_config.cache_config.kv_offloading_size is not None:
        yield "KV offloading is not supported: remove --kv-offloading-size"
    elif vllm_config.kv_transfer_config is not None:
        yield "KV connectors are not supported: remove --kv-transfer-config"
    if vllm_config.speculative_config is not None:
        yield "speculative decoding is not supported: remove --speculative-config"
    if vllm_config.attention_config.hisparse_config is not None:
        yield "HiSparse keeps KV in host memory: remove hisparse_config from --attention-config"
    if vllm_config.attention_config.backend_per_kind:
        yield "backend_per_kind would replace our attention: remove it from --attention-config"
    if envs.VLLM_BATCH_INVARIANT:
        yield "no kernel of ours is batch invariant: unset VLLM_BATCH_INVARIANT"


def _beside(vllm_config: VllmConfig, config: BudgetConfig) -> Iterator[str]:
    """What is not served of models some layers of which keep recurrent state or windows."""
    from vllm.platforms import current_platform

    cache, groups = vllm_config.cache_config, groups_of(vllm_config)
    if not groups.num_recurrent and not groups.num_windowed:
        return
    kept = "recurrent state" if groups.num_recurrent else "windows"
    if groups.is_split:
        yield (
            f"{groups.num_layers} layers with keys and values beside {groups.num_recurrent} with "
            "recurrent state are several groups, but a quota is of one: start without --kv-policy"
        )
    if config.host_bytes:
        yield f"host memory keeps no {kept}: remove --kv-host-memory"
    if groups.num_recurrent and cache.enable_mamba_shared_prefix_checkpoint:
        yield (
            "chunks of compressed prompts end where the quota says: remove "
            "--enable-mamba-shared-prefix-checkpoint"
        )
    if (
        refused_models.has_mamba2(vllm_config.model_config)
        and cache.mamba_cache_mode != "none"
        and current_platform.is_cpu()
    ):
        # stock vLLM starts, and its engine ends with the first prompt
        yield "vLLM caches no prefixes of Mamba2 on a CPU: add --no-enable-prefix-caching"
    if cache.prefix_match_unit is not None:
        yield (
            f"cached prefixes end with a block: remove --prefix-match-unit "
            f"{cache.prefix_match_unit}"
        )
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield f"{kept} need blocks of their own: {_own_blocks(vllm_config)}"
    parallel = vllm_config.parallel_config
    for size, flag in (
        (parallel.tensor_parallel_size, "--tensor-parallel-size"),
        (parallel.pipeline_parallel_size, stages.FLAG),
    ):
        if size > 1:
            yield f"no model with {kept} was tried on several devices: set {flag} {size} to 1"


def _own_blocks(vllm_config: VllmConfig) -> str:
    """What lets vLLM keep groups of layers."""
    from vllm import envs

    chunked = vllm_config.model_config.attention_chunk_size is not None
    if chunked and not envs.VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE:
        return "unset VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE"
    return "remove --disable-hybrid-kv-cache-manager"


def _scheduler(vllm_config: VllmConfig, config: BudgetConfig) -> Iterator[str]:
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is not None:
        yield f"--scheduler-cls {scheduler.scheduler_cls} would replace ours: remove it"
    if not scheduler.enable_chunked_prefill:
        yield _unchunked()
    if scheduler.long_prefill_token_threshold_adaptive and config.compresses:
        yield "chunks must not outgrow the quota: remove --long-prefill-token-threshold-adaptive"
    keeps_pictures = pictures.attend_both_ways(vllm_config.model_config)
    if scheduler.disable_chunked_mm_input and config.compresses and not keeps_pictures:
        # vLLM 0.33 never schedules a video that is longer than a chunk then
        yield "chunks must be able to cut a picture or video: remove --disable-chunked-mm-input"


def _unchunked() -> str:
    from vllm.platforms import CpuArchEnum, current_platform

    if current_platform.get_cpu_architecture() == CpuArchEnum.RISCV:
        return "vLLM prefills no prompt in chunks on RISC-V: start without --kv-policy"
    return "prompts must be prefilled in chunks: use --enable-chunked-prefill"
