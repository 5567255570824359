"""Reference of `attend`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import BatchRows, PagedHeads, Softmax


def attend(
    query: torch.Tensor,
    heads: PagedHeads,
    rows: BatchRows,
    out: torch.Tensor,
    scale: float | Softmax,
    ahead: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """See `vllm_budgetkv.ops.attend.attend`; `out` may also have the `compute_dtype`."""
    pool, table, lens = heads
    scale, cap, sinks, value_unit = softmax_fields(scale)
    group = query.shape[1] // heads.num_heads
    for row, slot in enumerate(rows.slots.tolist()):
        start, end = rows.query_start[row : row + 2].tolist()
        for head in range(heads.num_heads):
            num_keys = int(lens[slot, head])
            keys, values = read_head(pool, table[slot, head], num_keys, compute_dtype)
            query_heads = slice(head * group, (head + 1) * group)
            rotated = query[start:end, query_heads].to(compute_dtype).transpose(0, 1)
            # Query i sees the first num_keys - t + i + 1 keys, and those ahead of it.
            last_seen = torch.arange(num_keys - end + start, num_keys, device=query.device)
            if ahead is not None:
                last_seen += ahead[start:end]
            hidden = torch.arange(num_keys, device=query.device) > last_seen[:, None]
            scores = soft_cap(rotated @ keys.T * scale, cap).masked_fill(hidden, -torch.inf)
            if sinks is not None:
                sink = sinks[query_heads].to(compute_dtype)[:, None, None]
                scores = torch.cat((scores, sink.expand(-1, end - start, 1)), dim=-1)
            # A query that sees no key gets zeros: softmax gives NaN there.
            weights = scores.softmax(dim=-1)[..., :num_keys].masked_fill(hidden, 0.0)
            mean = weights @ values * value_unit
            out[start:end, query_heads] = mean.transpose(0, 1).to(out.dtype)


def softmax_fields(scale: float | Softmax) -> tuple[float, float, torch.Tensor | None, float]:
    """Scale, soft cap, sinks and unit of values, also of a scale alone."""
    return scale if isinstance(scale, tuple) else (scale, 0.0, None, 1.0)


def soft_cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Logits bent to stay below the cap; as they are if it is 0."""
    return cap * (logits / cap).tanh() if cap else logits


def read_head(
    pool: PagePool, pages: torch.Tensor, num_tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a head in the order of its tokens, [n, D] each."""
    held = pages[: -(-num_tokens // pool.layout.page_tokens)].long()
    keys = pool.keys[held].flatten(0, 1)[:num_tokens]
    values = pool.values[held].flatten(0, 1)[:num_tokens]
    return keys.to(dtype), values.to(dtype)
