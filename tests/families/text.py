"""Families that read text alone."""

from __future__ import annotations

from tests.families.family import Family
from vllm_budgetkv.testing import mimo_v2, models, recurrent, sliding

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
# vLLM's Mamba2 for CPUs returns no states between chunks, which prefix caching asks for
NO_CHECKPOINTS = {"enable_prefix_caching": False}
# vLLM's rotary kernel for CPUs misreads queries that are not flat
NATIVE_ROTARY = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
# what vLLM reads of a checkpoint's configuration that Transformers' class has no defaults for
LFM2 = {
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention"] * 2,
    "conv_dim": 128,
    "conv_dim_out": 128,
    "block_dim": 128,
    "block_auto_adjust_ff_dim": False,
}
MINISTRAL3 = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
        "llama_4_scaling_beta": 0.1,
    },
    "sliding_window": None,
}
WINDOWED = {"gemma3": ("v2", "compiled")}


def _windowed(name: str, kind: str, architecture: str, special: str) -> Family:
    """A family of `testing/sliding.py`."""
    return Family(
        name=name,
        architecture=architecture,
        folder=lambda cache: sliding.build(kind, cache),
        special=special,
        modes=WINDOWED.get(kind, ()),
    )


TEXT = [
    Family(name="Llama 3", architecture="LlamaForCausalLM", folder=models.build_llama),
    Family(
        name="Llama, YaRN",
        architecture="LlamaForCausalLM",
        config="LlamaConfig",
        fields={
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 2048,
            }
        },
    ),
    Family(
        name="Qwen2", architecture="Qwen2ForCausalLM", folder=models.build_qwen2, special="biases"
    ),
    Family(
        name="Qwen3",
        architecture="Qwen3ForCausalLM",
        config="Qwen3Config",
        special="norms of heads",
    ),
    Family(
        name="Qwen3 MoE",
        architecture="Qwen3MoeForCausalLM",
        config="Qwen3MoeConfig",
        fields={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        special="norms of heads, experts",
    ),
    Family(
        name="Mixtral",
        architecture="MixtralForCausalLM",
        config="MixtralConfig",
        fields=EXPERTS,
        special="experts",
    ),
    Family(
        name="Phi-3, Phi-4",
        architecture="Phi3ForCausalLM",
        config="Phi3Config",
        special="joined projections",
    ),
    Family(
        name="Granite 3",
        architecture="GraniteForCausalLM",
        config="GraniteConfig",
        fields={"attention_multiplier": 0.2, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
        special="scaled logits",
    ),
    Family(
        name="Granite 4, attention alone",
        architecture="GraniteMoeHybridForCausalLM",
        config="GraniteMoeHybridConfig",
        fields={
            **EXPERTS,
            "layer_types": ["attention"] * 2,
            "position_embedding_type": "nope",
            "shared_intermediate_size": 128,
            "attention_multiplier": 0.2,
            "mamba_n_heads": 4,
            "mamba_d_state": 16,
        },
        special="experts, scaled logits",
    ),
    Family(
        name="Granite 4, hybrid",
        architecture="GraniteMoeHybridForCausalLM",
        config="GraniteMoeHybridConfig",
        fields={
            **EXPERTS,
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "attention"] * 2,
            "position_embedding_type": "nope",
            "shared_intermediate_size": 128,
            "attention_multiplier": 0.2,
            "mamba_n_heads": 4,
            "mamba_d_state": 48,
        },
        engine=NO_CHECKPOINTS,
        special="Mamba2, experts",
        page_quota=2,
    ),
    Family(
        name="OLMo 2",
        architecture="Olmo2ForCausalLM",
        config="Olmo2Config",
        special="norms of queries and keys over all heads; through Transformers",
    ),
    _windowed("OLMo 3", "olmo3", "Olmo3ForCausalLM", "windows; through Transformers"),
    Family(
        name="SmolLM3",
        architecture="SmolLM3ForCausalLM",
        config="SmolLM3Config",
        fields={"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
        special="layers without positions; through Transformers",
    ),
    Family(
        name="Transformers backend",
        architecture="LlamaForCausalLM",
        config="LlamaConfig",
        engine={"model_impl": "transformers"},
        special="any of its decoders",
    ),
    _windowed("Gemma 2", "gemma2", "Gemma2ForCausalLM", "windows, soft caps"),
    _windowed("Gemma 3", "gemma3", "Gemma3ForCausalLM", "windows, norms of heads"),
    _windowed("gpt-oss", "gpt_oss", "GptOssForCausalLM", "windows, learned sinks, experts"),
    Family(
        name="MiMo-V2-Flash",
        architecture="MiMoV2FlashForCausalLM",
        folder=mimo_v2.build,
        runs_in_stock=False,
        special="values smaller than keys, windows with learned sinks and more KV heads, experts; "
        "lossless against Transformers",
        modes=("v2", "compiled"),
    ),
    _windowed("Llama 4", "llama4", "Llama4ForCausalLM", "attention in chunks, experts"),
    _windowed("EXAONE 4", "exaone4", "Exaone4ForCausalLM", "windows"),
    _windowed("Cohere 2", "cohere2", "Cohere2ForCausalLM", "windows, layers without positions"),
    _windowed("Ministral", "ministral", "MinistralForCausalLM", "windows"),
    _windowed("Mistral with layer types", "mistral", "MistralForCausalLM", "windows"),
    Family(
        name="Ministral 3, text",
        architecture="Ministral3ForCausalLM",
        config="Ministral3Config",
        fields=MINISTRAL3,
        special="queries scaled by position",
    ),
    Family(
        name="Qwen3-Next",
        architecture="Qwen3NextForCausalLM",
        folder=recurrent.build_qwen3_next,
        dtype="bfloat16",
        special="gated delta rule, gated attention, experts",
        page_quota=1,
    ),
    Family(
        name="Qwen3.5",
        architecture="Qwen3_5ForCausalLM",
        folder=recurrent.build_qwen3_5,
        dtype="bfloat16",
        special="gated delta rule, gated attention",
        modes=("v2", "compiled"),
        page_quota=1,
    ),
    Family(
        name="Nemotron-H",
        architecture="NemotronHForCausalLM",
        config="NemotronHConfig",
        fields={
            "layers_block_type": ["linear_attention", "full_attention", "mlp"] * 2,
            "num_hidden_layers": 6,
            "mamba_num_heads": 4,
            "mamba_head_dim": 64,
            "n_groups": 1,
            "ssm_state_size": 48,
        },
        engine=NO_CHECKPOINTS,
        special="Mamba2",
        page_quota=2,
    ),
    Family(
        name="LFM2",
        architecture="Lfm2ForCausalLM",
        config="Lfm2Config",
        fields=LFM2,
        engine=NATIVE_ROTARY,
        special="short convolutions",
    ),
    Family(
        name="DeepSeek-V2, -V3, Kimi K2",
        architecture="DeepseekV2ForCausalLM",
        config="DeepseekV2Config",
        fields={**MLA, "n_routed_experts": 4, "first_k_dense_replace": 2},
        special="MLA",
        refused="MLA, which has no KV heads to budget",
    ),
]
