"""Small models with windows or chunks in some layers and full attention in others.

    path = build_gemma3(cache)  # 6 layers, every third with full attention, windows of 64 tokens
    path = build("exaone4", cache, layers=8)

The families are the keys of `FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_budgetkv.testing import models, shapes, tokenizer, weights
from vllm_budgetkv.testing.shapes import DecoderShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen2Tokenizer

WINDOW_TOKENS = 64
# learned sinks of the first and the last query head
SINKS = (-1.0, 3.0)
# factors of the norms of queries and of keys
QUERY_NORM, KEY_NORM = 1.6, 1.2
# of embeddings that are the output's weights too: else each token would be followed by itself
TIED_GAIN = 0.02


@dataclass(frozen=True)
class Family:
    """How a model differs from the others.

    Args:
        config: class of Transformers.
        model: class of Transformers.
        norm_origin: weight of a norm that multiplies by nothing: some add one to it.
        is_tied: whether the embeddings are the weights of the output too.
        scales_embeddings: whether the model multiplies them by the root of its width.
        period: of so many layers the last has full attention.
        fields: of the configuration.
    """

    config: str
    model: str
    norm_origin: float = 0.0
    is_tied: bool = False
    scales_embeddings: bool = False
    period: int = 3
    fields: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "gemma3": Family(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        norm_origin=1.0,
        scales_embeddings=True,
        fields={"query_pre_attn_scalar": 32},
    ),
    # logits with a soft cap, low enough to bend them
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        norm_origin=1.0,
        is_tied=True,
        scales_embeddings=True,
        period=2,
        fields={"query_pre_attn_scalar": 32, "attn_logit_softcapping": 3.0},
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        period=2,
        fields={"num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    # full layers without rotary embedding
    "exaone4": Family("Exaone4Config", "Exaone4ForCausalLM"),
    "cohere2": Family("Cohere2Config", "Cohere2ForCausalLM", is_tied=True),
    "llama4": Family(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        fields={
            "attention_chunk_size": WINDOW_TOKENS,
            "no_rope_layer_interval": 3,
            "interleave_moe_layer_step": 64,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
    # through vLLM's backend for models of Transformers
    "olmo3": Family("Olmo3Config", "Olmo3ForCausalLM"),
    "ministral": Family("MinistralConfig", "MinistralForCausalLM"),
    "mistral": Family("MistralConfig", "MistralForCausalLM"),
}


def build_gemma3(cache: Path, **decoder: Any) -> Path:
    """Writes a text-only Gemma 3; arguments and result as for `build`."""
    return build("gemma3", cache, **decoder)


def build(kind: str, cache: Path, **decoder: Any) -> Path:
    """Writes a text-only model.

    Args:
        kind: a key of `FAMILIES`.
        cache: folder of models; the model gets a folder of its own inside.
        decoder: fields of `DecoderShape`.

    Returns:
        The folder of the model.
    """
    shape = DecoderShape(**{"layers": 6, **decoder})
    family = FAMILIES[kind]

    def write(folder: Path) -> None:
        import transformers

        vocabulary = tokenizer.build_tokenizer(shape.max_position_tokens)
        config = getattr(transformers, family.config)(**_fields(family, shape, vocabulary))
        model = getattr(transformers, family.model)(config).float()
        answers = tokenizer.readable_tokens(vocabulary)
        weights.randomise(model, shape.seed, range(shape.vocab_size) if family.is_tied else answers)
        scale_norms(model, family)
        model.to(getattr(torch, shape.dtype)).save_pretrained(folder)
        vocabulary.save_pretrained(folder)

    source = models.source() + Path(__file__).read_bytes()
    return models.cached(cache, shapes.fingerprint(kind, shape, source=source), write)


def num_full_layers(kind: str, layers: int = 6) -> int:
    """Layers with full attention of a model."""
    return layers // FAMILIES[kind].period


def _fields(family: Family, shape: DecoderShape, vocabulary: Qwen2Tokenizer) -> dict[str, Any]:
    is_chunked = "attention_chunk_size" in family.fields
    other = "chunked_attention" if is_chunked else "sliding_attention"
    return {
        **models.decoder_fields(shape, vocabulary),
        "head_dim": shape.head_dim,
        "layer_types": [
            other if (i + 1) % family.period else "full_attention" for i in range(shape.layers)
        ],
        "sliding_window": WINDOW_TOKENS,
        "tie_word_embeddings": family.is_tied,
        **family.fields,
    }


def scale_norms(model: PreTrainedModel, family: Family) -> None:
    """Undo what `randomise` does to norms that add one and to embeddings; sinks that differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter.fill_(QUERY_NORM - family.norm_origin)
            elif name.endswith("k_norm.weight"):
                parameter.fill_(KEY_NORM - family.norm_origin)
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0 - family.norm_origin)
            elif name.endswith("sinks"):
                parameter.copy_(torch.linspace(*SINKS, len(parameter)))
            elif "embed_tokens" in name:
                parameter.mul_(TIED_GAIN if family.is_tied else 1.0)
                parameter.mul_(parameter.shape[1] ** -0.5 if family.scales_embeddings else 1.0)
