"""How keys and values are stored: as the model computes them, or in 8 bits, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from vllm_budgetkv.arithmetic.layout import QUANTISED_DTYPE, PageLayout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.config import ModelConfig
    from vllm.config.cache import CacheDType

    from vllm_budgetkv.start.engine_config import EngineConfig

# what vLLM calls 8-bit floats of 4 bits of exponent and 3 of mantissa, one scale for a layer
QUANTISED = ("fp8", "fp8_e4m3")
# the same in a checkpoint of llm-compressor
KIND = (8, "float")
# the first NVIDIA GPUs that compute with them
LEAST_CAPABILITY = 89


def is_quantised(engine: EngineConfig) -> bool:
    """Whether keys and values are stored in 8 bits, of an engine that `settle` has seen."""
    return engine.cache_config.cache_dtype in QUANTISED


def element_bytes(engine: EngineConfig) -> int:
    """Bytes of an element of a key or value as it is stored."""
    return (QUANTISED_DTYPE if is_quantised(engine) else engine.model_config.dtype).itemsize


def layout_of(engine: EngineConfig, page_tokens: int) -> PageLayout:
    """Where the bytes of a head-page lie.

    Raises:
        ValueError: the page size, head size or dtype is not supported.
    """
    model = engine.model_config
    return PageLayout(page_tokens, model.get_head_size(), model.dtype, is_quantised(engine))


def settle(engine: EngineConfig) -> None:
    """Let the cache dtype say what vLLM will store, before it builds a layer. Mutates."""
    cache = engine.cache_config
    cache.cache_dtype = cast("CacheDType", _resolved(cache.cache_dtype, engine.model_config))


def refusals(engine: EngineConfig) -> Iterator[str]:
    """Why keys and values cannot be stored as is asked for; nothing if they can."""
    cache, model = engine.cache_config, engine.model_config
    stored, model_dtype = _resolved(cache.cache_dtype, model), _name_of(model)
    if stored in ("auto", model_dtype):
        return
    if stored not in QUANTISED:
        yield f"--kv-cache-dtype {stored} is not supported: {_instead(model)}"
        return
    if cache.kv_cache_dtype_skip_layers:
        yield (
            "all layers of a pool are stored alike: remove --kv-cache-dtype-skip-layers "
            + " ".join(cache.kv_cache_dtype_skip_layers)
        )
    kind = (_scheme(model).get("num_bits", 8), _scheme(model).get("type", "float"))
    if kind != KIND:
        yield (
            f"the checkpoint stores keys and values as {kind[1]} of {kind[0]} bits, which vLLM "
            "does not load: use another checkpoint"
        )
    if (strategy := _scheme(model).get("strategy", "tensor")) != "tensor":
        yield (
            f"the checkpoint scales keys and values by {strategy}, but a layer has one scale here: "
            f"use --kv-cache-dtype {_plain(model_dtype)}"
        )


def of_device(engine: EngineConfig) -> Iterator[str]:
    """Why this machine stores no 8-bit floats; nothing if it does or need not."""
    from vllm.platforms import current_platform

    if _resolved(engine.cache_config.cache_dtype, engine.model_config) not in QUANTISED:
        return
    if current_platform.is_cuda() and not current_platform.has_device_capability(LEAST_CAPABILITY):
        yield (
            "this GPU computes with no 8-bit floats, which came with compute capability 8.9: use "
            f"--kv-cache-dtype {_plain(_name_of(engine.model_config))}"
        )


def _resolved(cache_dtype: str, model: ModelConfig) -> str:
    """The cache dtype as vLLM names it, with `auto` resolved as far as the checkpoint says more."""
    from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

    found = resolve_kv_cache_dtype_string(cache_dtype, model)
    # a scheme is what vLLM itself reads only when it builds the first layer
    return "fp8" if found == "auto" and _scheme(model) else found


def _instead(model: ModelConfig) -> str:
    """What to store instead of something that is not supported."""
    model_dtype, automatic = _name_of(model), _resolved("auto", model)
    if automatic == "auto":
        return f"use fp8 or auto (here {model_dtype})"
    if automatic in QUANTISED:
        return "use auto, as the checkpoint asks for fp8"
    return f"the checkpoint asks for {automatic}, so use {_plain(model_dtype)}"


def _plain(model_dtype: str) -> str:
    """What stores keys and values as they are computed; vLLM has no option for float32."""
    return "bfloat16 and --dtype bfloat16" if model_dtype == "float32" else model_dtype


def _name_of(model: ModelConfig) -> str:
    return str(model.dtype).removeprefix("torch.")


def leaves_weights_alone(model: ModelConfig) -> bool:
    """Whether a checkpoint of llm-compressor says how to store keys and values, and no more."""
    return bool(_scheme(model)) and not _quantisation(model).get("config_groups")


def _scheme(model: ModelConfig) -> dict[str, Any]:
    """How a checkpoint of llm-compressor stores keys and values; empty if it does not say."""
    return _quantisation(model).get("kv_cache_scheme") or {}


def _quantisation(model: ModelConfig) -> dict[str, Any]:
    config = getattr(model.hf_config, "quantization_config", None)
    if config is None:
        config = getattr(model.hf_text_config, "quantization_config", None)
    return config or {}
