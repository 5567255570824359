"""Attention of recorded queries, and how concentrated it is."""

from __future__ import annotations

import torch

from vllm_budgetkv.policy import PolicyOptions

OPTIONS = PolicyOptions()


def attention(queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Softmax of what each query sees, float32 [H, G, m, n].

    Args:
        queries: float32 [Hq, m, D], rotated.
        keys: float32 [H, n, D], rotated.
        positions: int [m], of the queries; those from n on see all keys.
    """
    grouped = queries.unflatten(0, (keys.shape[0], -1))
    logits = torch.einsum("hgmd,hnd->hgmn", grouped, keys) * keys.shape[-1] ** -0.5
    hidden = torch.arange(keys.shape[1]) > positions[:, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)


def concentration(weights: torch.Tensor) -> torch.Tensor:
    """S of each KV head, float32 [H]: top-k mass without the sinks, mean over the queries, least of
    the query heads, as the policy `hybrid` has it.

    Args:
        weights: float32 [H, G, m, n].
    """
    count = OPTIONS.top_k_tokens(weights.shape[-1])
    rest = weights[..., OPTIONS.sink_tokens :]
    rest = rest / rest.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    top = rest.topk(min(count, rest.shape[-1]), dim=-1).values
    return top.sum(dim=-1).mean(dim=-1).amin(dim=-1)
