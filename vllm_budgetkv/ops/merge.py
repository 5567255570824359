"""`merge`: tokens that a head is about to drop go into the kept ones that are most like them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.merge import merge as merge_reference
from vllm_budgetkv.ops.require import require, require_keep, require_request

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads

MERGE_MODES = ("average", "pivot", "weighted", "value")
VALUE_THRESHOLD = 0.8


def merge(
    keep: torch.Tensor,
    heads: PagedHeads,
    is_vision: torch.Tensor,
    mode: str,
    seen_tokens: int,
    threshold: float = VALUE_THRESHOLD,
) -> None:
    """Merge the tokens that `compact` will drop into those that it will keep, head by head.

    Every dropped token e has one pivot p: the kept token of its head whose stored, rotated key has
    the highest cosine c_e with its own; equal cosines go to the lower index, and a key of norm 0
    has cosine 0 with every other. E is the set of the dropped tokens of a pivot. In the modes of
    LOOK-M (https://arxiv.org/abs/2406.18139), x is the key and, with the same pivots, the value:

    - average: x_p <- mean({x_p} + {x_e for e in E})
    - pivot: x_p <- mean({x_p} + {(x_e + x_p) / 2 for e in E})
    - weighted: x_p <- mean({x_p} + {c_e x_e for e in E}), where E leaves out tokens whose position
      has a cosine below the mean: its mean over the heads that drop the position is compared with
      the mean over all dropped tokens of all heads. These means are taken in float64.

    The fourth leaves keys alone, because a mean of keys that M-RoPE has turned differently matches
    no query, and weighs as kvpress does:

    - value: v_p <- (v_p + sum(w_e v_e)) / (1 + sum(w_e)) with w_e = c_e |v_e| / (|v_e| + |v_p|).
      p is chosen among the kept tokens of e's modality, and e is left out if c_e < `threshold`.

    All means are of the values before the call, in float32, rounded once to that of the pages. Kept
    tokens are never sources, and tokens of a head that keeps none (or, by value, none of that
    modality) are lost. Positions and digests are not touched: the digest of a page whose
    keys changed is stale until `digest` runs. No token remembers how many it has taken in: at the
    next call it counts as one again.

    The cost is a matrix product, dropped times kept tokens of a head.

    Args:
        keep: bool [H, n], which tokens survive; n is at least the largest of `lens`, and what
            lies beyond `lens` is ignored.
        heads: of one request; keys (but for `value`) and values of pivots are mutated.
        is_vision: bool [H, n], read by `value` only.
        mode: one of `MERGE_MODES`.
        seen_tokens: tokens of the request so far; all positions are below it.
        threshold: least cosine of `value`.

    Raises:
        ValueError: a shape or dtype does not fit, or the mode is unknown.
    """
    require_request(heads)
    require_keep(keep, heads)
    require("is_vision", is_vision, torch.bool, keep.shape)
    if mode not in MERGE_MODES:
        raise ValueError(f"mode {mode!r} is unknown; choose one of {', '.join(MERGE_MODES)}")
    if seen_tokens < 0:
        raise ValueError(f"seen_tokens is {seen_tokens}; pass how many tokens the request has seen")
    match backend.of(keep):
        case "reference":
            merge_reference(keep, heads, is_vision, mode, seen_tokens, threshold)
        case "triton":
            from vllm_budgetkv.ops.triton.merge import merge as merge_triton

            merge_triton(keep, heads, is_vision, mode, seen_tokens, threshold)
        case "cpp":
            extension.load()
            pool = heads.pool
            fields = (pool.keys, pool.values, pool.positions)
            tables = (heads.table, heads.lens, is_vision)
            torch.ops.budgetkv.merge(keep, *fields, *tables, mode, threshold, seen_tokens)
