"""`recall`: bring back what a decode step's queries look for, into the first pages of a head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.recall import recall as recall_reference
from vllm_budgetkv.ops.require import require, require_layer, require_recalls, require_tier

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import BatchRows, PagedHeads, RecallHeads, TierLayer


def recall(
    query: torch.Tensor,
    heads: PagedHeads,
    rows: BatchRows,
    recalls: RecallHeads,
    tier: TierLayer,
    scale: float,
    moved: torch.Tensor,
) -> None:
    """Fill the recall pages of every head that recalls for the query of each row, in one layer.

    The index says a key of each of n tokens (`encode`), with `entry_tokens` > 1 the same of
    neighbours. Of those that the head does not hold
    (`mark`), the `num_recalled` with the largest sum, over the group's query heads, of
    softmax(scale q.k) over all n, in float32, stand in the head's first pages behind it; of equals
    the later one is taken. A token that stands there already stays at its place; the others of
    these places are overwritten with what is missing, both in ascending order, from host memory.

    After HybridKV's dynamic heads (https://arxiv.org/abs/2604.05887), which fetch whole chunks;
    sketches of keys after ShadowKV (https://arxiv.org/abs/2410.21465).

    Args:
        query: computed dtype [R, Hq, D]: one decode query per row.
        heads: one layer of all slots. K, V and positions of recall pages are mutated; a position of
            -1 there says that the place is empty.
        rows: of the batch, a token each or none; `slots` and `query_start` are read.
        recalls: of the same layer; at least `num_recalled` of the tokens are not held.
        tier: of the same layer.
        scale: of the logits, as for `attend`.
        moved: int32 [S, H], grows by the tokens that were fetched.

    Raises:
        ValueError: a shape or dtype does not fit.
        IndexError: a slot, a page or a block id is out of range.
    """
    layout = heads.pool.layout
    require_layer(heads)
    num_slots, num_heads = heads.lens.shape
    require_recalls(recalls, (num_slots, num_heads))
    require_tier(tier, num_slots)
    require("moved", moved, torch.int32, (num_slots, num_heads))
    require("slots", rows.slots, torch.int32, (None,))
    require("query", query, layout.dtype, (rows.slots.shape[0], None, layout.head_size))
    if query.shape[1] % num_heads:
        raise ValueError(
            f"query has {query.shape[1]} heads; pass a multiple of the {num_heads} KV heads"
        )
    match backend.of(query):
        case "reference":
            recall_reference(query, heads, rows, recalls, tier, scale, moved)
        case "triton":
            from vllm_budgetkv.ops.triton.recall import recall as recall_triton

            recall_triton(query, heads, rows, recalls, tier, scale, moved)
        case "cpp":
            extension.load()
            pool = heads.pool
            fields = (pool.keys, pool.values, pool.positions, pool.index_words, pool.digests)
            batch = (rows.slots, rows.query_start)
            tables = (heads.table, *recalls, *tier)
            torch.ops.budgetkv.recall(
                query, *fields, layout.code_words, *batch, *tables, scale, moved
            )
