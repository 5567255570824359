"""A small MiMo-V2-Flash: values of fewer elements than keys, sinks and more KV heads in windows.

    path = build(cache)  # 6 layers, the first and every third with full attention

A configuration names everything twice: as Transformers' class reads it, and as the checkpoint on
the hub, whose fields vLLM's class reads.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_budgetkv.testing import models, shapes, tokenizer, weights
from vllm_budgetkv.testing.shapes import DecoderShape
from vllm_budgetkv.testing.sliding import SINKS, WINDOW_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen2Tokenizer

# elements of a key and of a value, as 192 and 128 in the checkpoint
HEAD_SIZE, HEAD_SIZE_V = 96, 64
PERIOD = 3
# of a head, so that a third of its channels turn
ROTARY_SHARE = 0.334
FULL_THETA, WINDOW_THETA = 1e6, 1e4
# of the scores by which a router chooses experts, not of their weights
CHOICE_STD = 0.1


def build(cache: Path, layers: int = 6, **fields: Any) -> Path:
    """Writes a model.

    Args:
        cache: folder of models; the model gets a folder of its own inside.
        layers: how many.
        fields: of the configuration that differ.

    Returns:
        The folder of the model.
    """
    # its own sizes of heads are not those of the shape
    shape = DecoderShape(layers=layers, hidden=128, heads=8, kv_heads=2, head_dim=16)

    def write(folder: Path) -> None:
        from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

        vocabulary = tokenizer.build_tokenizer(shape.max_position_tokens)
        config = MiMoV2FlashConfig(**{**_fields(shape, vocabulary), **fields})
        model = MiMoV2FlashForCausalLM(config).float()
        weights.randomise(model, shape.seed, tokenizer.readable_tokens(vocabulary))
        _scale(model, shape.seed)
        model.save_pretrained(folder)
        vocabulary.save_pretrained(folder)

    source = models.source() + Path(__file__).read_bytes() + repr(fields).encode()
    return models.cached(cache, shapes.fingerprint("mimo_v2", shape, source=source), write)


def build_full(cache: Path, layers: int = 3) -> Path:
    """Writes a model with full attention in all layers; arguments and result as for `build`."""
    return build(
        cache,
        layers,
        layer_types=["full_attention"] * layers,
        hybrid_layer_pattern=[0] * layers,
        add_swa_attention_sink_bias=False,
    )


def num_full_layers(layers: int = 6) -> int:
    """Layers with full attention of a model."""
    return -(-layers // PERIOD)


def _fields(shape: DecoderShape, vocabulary: Qwen2Tokenizer) -> dict[str, Any]:
    is_windowed = [layer % PERIOD != 0 for layer in range(shape.layers)]
    is_sparse = [layer > 0 for layer in range(shape.layers)]
    rope = {"rope_type": "default", "partial_rotary_factor": ROTARY_SHARE}
    common = models.decoder_fields(shape, vocabulary)
    transformers_fields = {
        "head_dim": HEAD_SIZE,
        "v_head_dim": HEAD_SIZE_V,
        "sliding_window": WINDOW_TOKENS,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in is_windowed],
        "mlp_layer_types": ["sparse" if s else "dense" for s in is_sparse],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "rope_parameters": {
            "full_attention": rope | {"rope_theta": FULL_THETA},
            "sliding_attention": rope | {"rope_theta": WINDOW_THETA},
        },
    }
    hub_fields = {
        "hybrid_layer_pattern": [int(w) for w in is_windowed],
        "moe_layer_freq": [int(s) for s in is_sparse],
        "layernorm_epsilon": common["rms_norm_eps"],
        "sliding_window_size": WINDOW_TOKENS,
        "attention_chunk_size": WINDOW_TOKENS,
        "swa_num_attention_heads": shape.heads,
        "swa_num_key_value_heads": 2 * shape.kv_heads,
        "swa_head_dim": HEAD_SIZE,
        "swa_v_head_dim": HEAD_SIZE_V,
        "swa_rope_theta": WINDOW_THETA,
        "rope_theta": FULL_THETA,
        "partial_rotary_factor": ROTARY_SHARE,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    }
    return {**common, **transformers_fields, **hub_fields}


def _scale(model: PreTrainedModel, seed: int) -> None:
    """Sinks that differ, experts that weigh as much as a dense layer, and choices among them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(*SINKS, len(parameter)))
            elif parameter.dim() == 3:
                # experts are stacked in front of their rows
                parameter.mul_(math.sqrt(parameter.shape[1]))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, CHOICE_STD, generator=generator)
