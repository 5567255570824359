"""A vision tower that attends to all frames of a batch at once."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.nn import functional
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision


def attend_in_batches(visual: Any) -> None:
    """Replace the tower's attention, which loops over frames, by one call for all of them.

    Right only where all windows and all frames are equal in size, as in a training batch; it is
    many times faster for thousands of small frames. Mutates `visual`.
    """
    for block in visual.blocks:
        block.attn.forward = MethodType(_attend, block.attn)


def _attend(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **_: Any,
) -> torch.Tensor:
    num_patches, num_windows = hidden_states.shape[0], len(cu_seqlens) - 1
    if not torch.equal(cu_seqlens, torch.arange(num_windows + 1) * (num_patches // num_windows)):
        raise ValueError("frames of a training batch must be equal in size")
    qkv = self.qkv(hidden_states).view(num_patches, 3, self.num_heads, -1)
    query, key, value = qkv.unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    heads = [x.view(num_windows, -1, *x.shape[1:]).transpose(1, 2) for x in (query, key, value)]
    out = functional.scaled_dot_product_attention(*heads, scale=self.scaling)
    return self.proj(out.transpose(1, 2).reshape(num_patches, -1))
