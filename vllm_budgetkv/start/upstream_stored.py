"""What we touch in vLLM where keys and values are stored in 8 bits; rows of `upstream.py`."""

from __future__ import annotations

from vllm_budgetkv.start.touchpoint import Touchpoint

# fmt: off
STORED_TOUCHPOINTS = (
    Touchpoint("vllm.utils.torch_utils", "resolve_kv_cache_dtype_string", "read",
               "whether the checkpoint asks for a quantised cache",
               ("kv_cache_dtype", "model_config")),
    Touchpoint("vllm.v1.attention.backend", "AttentionBackend.supported_kv_cache_dtypes",
               "override", "those of the kernels"),
    Touchpoint("vllm.model_executor.layers.attention.attention", "set_default_quant_scales", "read",
               "sets `_k_scale_float` and `_v_scale_float` of a layer, its units",
               ("layer", "register_buffer")),
    Touchpoint("vllm.model_executor.layers.quantization.kv_cache",
               "BaseKVCacheMethod.process_weights_after_loading", "read",
               "sets them by the checkpoint", ("self", "layer")),
)
# fmt: on
