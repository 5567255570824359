"""What the plugin does not serve: refused at start, with the reason and the option to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_budgetkv import platforms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.config import VllmConfig

    from vllm_budgetkv.config import BudgetConfig


def check(vllm_config: VllmConfig, config: BudgetConfig) -> None:
    """Refuse an engine configuration that the plugin cannot serve.

    Raises:
        ValueError: names every reason and the option to change.
    """
    reasons = [
        *_platform(config),
        *_model(vllm_config),
        *_parallel(vllm_config),
        *_cache(vllm_config),
    ]
    reasons += _scheduler(vllm_config, config)
    if reasons:
        raise ValueError(
            f"--kv-policy {config.policy} cannot serve this configuration:\n  - "
            + "\n  - ".join(reasons)
        )


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
            f"no version was tested on device {platform.device!r} yet: run on a CPU, start "
            "without --kv-policy, or try it with --kv-unproven-device"
        )


def _model(vllm_config: VllmConfig) -> Iterator[str]:
    model = vllm_config.model_config
    if model.runner_type != "generate":
        yield f"runner {model.runner_type!r} keeps no growing cache: use --runner generate"
    if model.use_mla:
        yield "the model uses MLA, which has no KV heads to budget: start without --kv-policy"
    if model.is_hybrid or model.is_attention_free:
        yield "the model keeps recurrent state beside or instead of KV: start without --kv-policy"
    if model.is_encoder_decoder:
        yield "the model has cross attention: start without --kv-policy"
    if model.get_sliding_window() is not None:
        yield (
            "the model uses sliding-window attention, which bounds its cache by itself: start "
            "without --kv-policy or with --disable-sliding-window"
        )
    if model.is_mm_prefix_lm:
        yield "the model attends to later image tokens, so chunks cannot be cut: no --kv-policy"


def _parallel(vllm_config: VllmConfig) -> Iterator[str]:
    parallel = vllm_config.parallel_config
    for name, flag in (
        ("pipeline_parallel_size", "--pipeline-parallel-size"),
        ("decode_context_parallel_size", "--decode-context-parallel-size"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
    ):
        if (size := getattr(parallel, name)) > 1:
            yield f"{flag} {size} is not supported: set it to 1"


def _cache(vllm_config: VllmConfig) -> Iterator[str]:
    cache_dtype = vllm_config.cache_config.cache_dtype
    model_dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if cache_dtype not in ("auto", model_dtype):
        yield f"--kv-cache-dtype {cache_dtype} is not supported: use auto (here {model_dtype})"
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        yield "layers that share their cache are not supported: remove --kv-sharing-fast-prefill"
    if vllm_config.kv_transfer_config is not None:
        yield "KV connectors and offloading are not supported: remove --kv-transfer-config"
    if vllm_config.speculative_config is not None:
        yield "speculative decoding is not supported: remove --speculative-config"


def _scheduler(vllm_config: VllmConfig, config: BudgetConfig) -> Iterator[str]:
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is not None:
        yield f"--scheduler-cls {scheduler.scheduler_cls} would replace ours: remove it"
    if not scheduler.enable_chunked_prefill:
        yield "prompts must be prefilled in chunks: use --enable-chunked-prefill"
    if scheduler.long_prefill_token_threshold_adaptive and config.compresses:
        yield "chunks must not outgrow the quota: remove --long-prefill-token-threshold-adaptive"
    if scheduler.disable_chunked_mm_input and config.compresses:
        # vLLM 0.33 never schedules a video that is longer than a chunk then
        yield "chunks must be able to cut a picture or video: remove --disable-chunked-mm-input"
