"""A load format of vLLM that reads no file: noise, scaled so that answers depend on the context.

vLLM's own modules are filled, so a class needs no counterpart in Transformers. A parameter's noise
follows from its name alone: engines of one configuration have equal weights.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm_budgetkv.testing.sliding import SINKS, TIED_GAIN
from vllm_budgetkv.testing.tokenizer import readable_tokens
from vllm_budgetkv.testing.weights import BIAS_STD, KEY_GAINS, QUERY_GAIN

LOAD_FORMAT = "noise"
# rates at which heads of Mamba2 forget
DECAYS = (0.05, 1.0)
# what norms of queries and of keys multiply by
HEAD_NORM = 1.5
# factor of the last norm where embeddings, small beside what layers add, are the head too: else all
# tokens would be as likely
SHARPENING = 50.0


@register_model_loader(LOAD_FORMAT)
class NoiseLoader(BaseModelLoader):
    """Fills a model; see `fill`."""

    def download_model(self, model_config: Any) -> None:
        """There is nothing to download."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Fill all parameters of `model`."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_config.model)
        special = set(tokenizer.added_tokens_decoder)
        fill(model, [token for token in readable_tokens(tokenizer) if token not in special])


@torch.no_grad()
def fill(model: nn.Module, answer_tokens: list[int]) -> None:
    """Overwrite the parameters of `model` with noise.

    Args:
        model: of vLLM. Mutated.
        answer_tokens: ids that greedy decoding may choose.
    """
    seen: set[int] = set()
    is_tied, gains = _is_tied(model), _gains(model)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full_name = f"{path}.{name}"
            generator = torch.Generator().manual_seed(zlib.crc32(full_name.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            scaled = _scaled(full_name, module, parameter, noise)
            if isinstance(module, ParallelLMHead):
                scaled = _of_head(scaled, answer_tokens)
            elif isinstance(module, VocabParallelEmbedding) and is_tied:
                scaled = scaled * TIED_GAIN
            parameter.copy_(scaled / gains.get(id(parameter), 1.0))
    for owner in _multiplying(model) if is_tied else []:
        # one is added to it
        owner.norm.weight.add_(SHARPENING - 1.0)


def _is_tied(model: nn.Module) -> bool:
    """Whether the head is the embedding, or has its rows."""
    heads = [module for module in model.modules() if isinstance(module, ParallelLMHead)]
    embeddings = [m for m in model.modules() if type(m) is VocabParallelEmbedding]
    shared = {id(module.weight) for module in embeddings}
    return all(id(head.weight) in shared for head in heads)


def _multiplying(model: nn.Module) -> list[nn.Module]:
    """Models that multiply their embeddings: Gemma, by 11 and more."""
    return [module for module in model.modules() if hasattr(module, "normalizer")]


def _gains(model: nn.Module) -> dict[int, float]:
    """By what, by id of the embeddings' weight: what is read would hardly show beside them."""
    owners = _multiplying(model)
    return {id(owner.embed_tokens.weight): float(owner.normalizer) for owner in owners}


def _scaled(
    name: str, module: nn.Module, parameter: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    if parameter.dim() == 0:
        return torch.ones_like(noise)
    if parameter.dim() == 1:
        return _vector(name, module, parameter, noise)
    if isinstance(module, (nn.Embedding, VocabParallelEmbedding)) and "lm_head" not in name:
        return noise
    is_convolution = "Conv" in type(module).__name__
    # experts are stacked in front of their rows
    fan_in = parameter[0].numel() if is_convolution else parameter.shape[-1]
    scaled = noise / math.sqrt(fan_in)
    if isinstance(module, QKVParallelLinear):
        _spread(scaled, module)
    return scaled


def _vector(
    name: str, module: nn.Module, parameter: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Biases, and factors of norms, which keep what the model makes them: 0 or 1 for nothing."""
    if name.endswith("sinks"):
        return torch.linspace(*SINKS, len(parameter))
    if name.endswith(".A"):
        return -torch.linspace(*DECAYS, len(parameter))
    if "bias" in name:
        return BIAS_STD * noise
    if "Norm" not in type(module).__name__:
        return torch.ones_like(noise)
    kept = parameter.float()
    is_of_heads = any(part in name for part in ("q_norm", "k_norm", "query_norm", "key_norm"))
    return kept - 1.0 + HEAD_NORM if is_of_heads and kept.mean() > 0.5 else kept


def _spread(weight: torch.Tensor, module: QKVParallelLinear) -> None:
    """Heads that attend broadly and heads that attend to few tokens, in place."""
    size, num_queries, num_keys = module.head_size, module.num_heads, module.num_kv_heads
    queries = weight[: num_queries * size]
    keys = weight[num_queries * size : (num_queries + num_keys) * size]
    queries.mul_(QUERY_GAIN)
    gains = torch.linspace(*KEY_GAINS, num_keys)
    keys.view(num_keys, -1).mul_(gains[:, None])


def _of_head(weight: torch.Tensor, answer_tokens: list[int]) -> torch.Tensor:
    """The rows of tokens that may be chosen; those of others are zeros."""
    kept = torch.zeros_like(weight)
    kept[answer_tokens] = weight[answer_tokens]
    return kept
