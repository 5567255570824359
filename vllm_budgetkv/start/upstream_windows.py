"""What we touch in vLLM for layers with windows or chunks beside ours; rows of `upstream.py`."""

from __future__ import annotations

from vllm_budgetkv.start.touchpoint import Touchpoint

_CPU = "vllm.v1.attention.backends.cpu_attn"
_SPEC = "vllm.v1.kv_cache_interface"

# fmt: off
WINDOW_TOUCHPOINTS = (
    Touchpoint("vllm.v1.attention.selector", "get_attn_backend", "replace",
               "while our model loads, such layers get vLLM's own backend",
               ("head_size", "dtype", "kv_cache_dtype", "use_mla", "has_sink", "use_sparse",
                "use_mm_prefix", "use_per_head_quant_scales", "attn_type", "num_heads",
                "has_sliding_window")),
    Touchpoint(_CPU, "CPUAttentionBackend", "subclass",
               "their backend on a CPU, in the buffer that ours need", device="cpu"),
    Touchpoint(_CPU, "CPUAttentionBackendImpl", "subclass",
               "adds nothing in a run without requests", device="cpu"),
    Touchpoint(_CPU, "CPUAttentionMetadataBuilder", "subclass",
               "tokens of pictures that attend both ways, once more", device="cpu"),
    Touchpoint(_CPU, "CPUAttentionMetadata", "subclass", "the same", device="cpu"),
    Touchpoint("vllm.model_executor.layers.attention", "Attention", "replace",
               "while MiMo-V2 loads, layers whose values are smaller than keys choose no backend"),
    Touchpoint("vllm.v1.attention.backends.triton_attn_diffkv",
               "TritonAttentionDiffKVBackend.set_head_size_v", "read",
               "on a GPU such layers get this one, if they have windows", ("cls", "head_size_v"),
               device="cuda"),
    Touchpoint(_SPEC, "iter_layer_specs", "read", "which group of layers is ours",
               ("kv_cache_spec",)),
)
# fmt: on
