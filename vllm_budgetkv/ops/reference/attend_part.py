"""Reference of `attend_part`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops.reference.attend import read_head

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import BatchRows, PagedHeads


def attend_part(
    query: torch.Tensor,
    heads: PagedHeads,
    rows: BatchRows,
    first_token: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """See `vllm_budgetkv.ops.attend_part.attend_part`; results may have the `compute_dtype`."""
    pool, table, lens = heads
    group = query.shape[1] // heads.num_heads
    for row, slot in enumerate(rows.slots.tolist()):
        start, end = rows.query_start[row : row + 2].tolist()
        positions = int(rows.first_position[row]) + torch.arange(end - start, device=query.device)
        for head in range(heads.num_heads):
            num_keys = int(lens[slot, head])
            keys, values = read_head(pool, table[slot, head], num_keys, compute_dtype)
            query_heads = slice(head * group, (head + 1) * group)
            rotated = query[start:end, query_heads].to(compute_dtype).transpose(0, 1)
            key_positions = first_token + torch.arange(num_keys, device=query.device)
            hidden = key_positions > positions[:, None]
            scores = (rotated @ keys.T * scale).masked_fill(hidden, -torch.inf)
            # a query that sees no key gets zeros: softmax gives NaN there
            weights = scores.softmax(dim=-1).masked_fill(hidden, 0.0)
            out[start:end, query_heads] = (weights @ values).transpose(0, 1).to(out.dtype)
            lse[start:end, query_heads] = scores.logsumexp(dim=-1).T.to(lse.dtype)
