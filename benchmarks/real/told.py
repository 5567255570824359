"""The pretrained model in transformers, told for every head which tokens a step may read.

A cache of pages holds what a policy left; here all keys and values stay, and a mask hides what the
policy dropped. Positions are the original ones, so the outcome is that of a cache without the
dropped tokens. It needs no engine, so a rule can be tried before there is a kernel for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import DynamicCache, LlamaForCausalLM

Readable = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, queries [Hq, a, D], keys [H, n, D]) to what each step may read, bool [H, a, n]."""

NAME = "told"


@dataclass(frozen=True)
class Memory:
    """What a prompt left behind, all of it. L layers, Hq query and H KV heads, n tokens.

    Attributes:
        keys, values: float32, of each layer [H, n, D]; keys are rotated.
        queries: float32 [L, Hq, rows, D] of the last tokens, rotated.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    queries: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.keys[0].shape[1]

    def first(self, num_tokens: int) -> Memory:
        """The same of the first tokens, without queries."""
        keys, values = ([one[:, :num_tokens] for one in side] for side in (self.keys, self.values))
        return Memory(keys, values, self.queries[:, :, :0])


class ToldModel:
    """A Llama-like model.

    Args:
        folder: that transformers can load.
    """

    def __init__(self, folder: str) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register(NAME, _attend)
        self._model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=NAME
        ).eval()
        rotary: Any = self._model.model.rotary_emb
        self.inv_freq: torch.Tensor = rotary.inv_freq

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], num_queries: int) -> Memory:
        """Run a prompt, and take the last `num_queries` queries along."""
        seen = _Seen(num_queries)
        self._model(torch.tensor([tokens]), use_cache=False, told=seen)
        return Memory(seen.keys, seen.values, torch.stack(seen.queries))

    @torch.inference_mode()
    def ask(self, memory: Memory, tokens: Sequence[int], num_queries: int) -> torch.Tensor:
        """Queries of the last `num_queries` of tokens that follow a memory, [L, Hq, rows, D]."""
        seen = _Asked(num_queries)
        self._model(torch.tensor([tokens]), past_key_values=cache_of(memory), told=seen)
        return torch.stack(seen.queries)

    @torch.inference_mode()
    def answer(self, memory: Memory, tokens: Sequence[int], readable: Readable) -> torch.Tensor:
        """Logits behind each of `tokens`, which follow the memory; float32 [a, vocabulary].

        Args:
            memory: what was seen before.
            tokens: a of them.
            readable: which tokens of the memory each of these steps may read. They read each other
                as ever.
        """
        told = _Told(readable, memory.num_tokens)
        output = self._model(torch.tensor([tokens]), past_key_values=cache_of(memory), told=told)
        return output.logits[0]


def cache_of(memory: Memory) -> DynamicCache:
    """A cache of transformers that begins with a memory; the memory is not mutated."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(memory.keys, memory.values, strict=True)):
        cache.update(keys[None], values[None], layer)
    return cache


class _Seen:
    """Takes keys, values and last queries of every layer along; every token reads those before."""

    def __init__(self, num_queries: int) -> None:
        self._num_queries = num_queries
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.queries: list[torch.Tensor] = []

    def mask(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor | None:
        assert layer == len(self.keys)
        self.keys.append(key)
        self.values.append(value)
        self.queries.append(query[:, query.shape[1] - self._num_queries :])
        return None


class _Asked:
    """Takes the last queries of every layer along, of tokens that follow others and read all."""

    def __init__(self, num_queries: int) -> None:
        self._num_queries = num_queries
        self.queries: list[torch.Tensor] = []

    def mask(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor | None:
        assert layer == len(self.queries)
        self.queries.append(query[:, query.shape[1] - self._num_queries :])
        steps, tokens = query.shape[1], key.shape[1]
        mask = torch.ones(steps, tokens, dtype=torch.bool).tril(tokens - steps)
        return mask.expand(query.shape[0], -1, -1)


@dataclass(frozen=True)
class _Told:
    """Asks for every layer what may be read of the first `num_tokens`."""

    readable: Readable
    num_tokens: int

    def mask(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor | None:
        del value
        steps = query.shape[1]
        causal = torch.ones(steps, steps, dtype=torch.bool).tril()
        past = self.readable(layer, query, key[:, : self.num_tokens])
        mask = torch.cat([past, causal.expand(past.shape[0], -1, -1)], dim=-1)
        return mask.repeat_interleave(query.shape[0] // past.shape[0], dim=0)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    told: _Seen | _Asked | _Told,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface; [1, a, Hq, D]."""
    del attention_mask
    mask = told.mask(module.layer_idx, query[0], key[0], value[0])
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else mask[None],
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=True,
    )
    return output.transpose(1, 2).contiguous(), None
