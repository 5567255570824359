"""Random weights: attention that differs by head, answers that vary with the prompt."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

# scale of queries, and of the keys of the first and the last KV head: the product is the standard
# deviation of the logits, so the first head attends broadly and the last one to few tokens
QUERY_GAIN = 1.6
KEY_GAINS = (0.7, 2.8)
BIAS_STD = 0.1


def randomise(model: PreTrainedModel, seed: int, answer_tokens: Iterable[int]) -> None:
    """Overwrites every parameter of `model` with seeded noise scaled by its fan-in.

    Args:
        model: a Hugging Face causal language model with an `lm_head`, in float32. Mutated.
        seed: of the generator; parameters are drawn in the order of their names.
        answer_tokens: ids that greedy decoding may choose; the output rows of all others are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            _fill(name, parameter, generator)
            if name.endswith("k_proj.weight"):
                _spread_keys(parameter, model.config.get_text_config().num_key_value_heads)
        output = model.get_output_embeddings().weight
        allowed = torch.zeros(output.shape[0], dtype=torch.bool)
        allowed[list(answer_tokens)] = True
        output[~allowed] = 0.0


def _fill(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    if parameter.dim() == 1:
        if name.endswith("bias"):
            parameter.normal_(0.0, BIAS_STD, generator=generator)
        else:
            parameter.fill_(1.0)
    elif "embed_tokens" in name:
        parameter.normal_(0.0, 1.0, generator=generator)
    else:
        fan_in = parameter[0].numel()
        gain = QUERY_GAIN if "q_proj" in name else 1.0
        parameter.normal_(0.0, gain / math.sqrt(fan_in), generator=generator)


def _spread_keys(weight: torch.Tensor, num_kv_heads: int) -> None:
    """Scales the rows of each KV head of `weight`, `[kv_heads * head_dim, hidden]`, in place."""
    gains = torch.linspace(*KEY_GAINS, num_kv_heads)
    weight.view(num_kv_heads, -1).mul_(gains[:, None])
