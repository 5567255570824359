"""`score`: how much a probe attends to every token of one request and layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.score import score as score_reference
from vllm_budgetkv.ops.require import (
    require,
    require_request,
    require_softmax,
    require_width,
)
from vllm_budgetkv.ops.views import Softmax

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads


class Scores(NamedTuple):
    """What `score` says of every token and every query head.

    Attributes:
        mass: float32 [H, n], mean or largest attention of the probe; 0 beyond `lens`.
        topk_mass: float32 [Hq], mean share of the attention that the top k tokens get.
        value_norms: float32 [H, n], L2 norm of each value, not as stored but in units of the model;
            0 beyond `lens`.
        positions: int32 [H, n], logical index of each token; -1 beyond `lens`.
    """

    mass: torch.Tensor
    topk_mass: torch.Tensor
    value_norms: torch.Tensor
    positions: torch.Tensor


def score(
    probe: torch.Tensor,
    heads: PagedHeads,
    scale: float | Softmax,
    top_k: int,
    num_sinks: int,
    takes_largest: bool,
    max_tokens: int,
) -> Scores:
    """Attention of the probe to the cached tokens of one request and layer, in float32.

    For probe row m and query head q (KV head q // G), p = softmax(scale * q.k) over *all* tokens
    of the head: the probe stands behind the cache, so there is no causal mask. A learned sink has
    its share of p, but not of the top-k mass. With the G heads of the group, `mass` of a token is

        mean_g mean_m p[m, g], as in SnapKV, or
        mean_g max_m p[m, g] if `takes_largest`: the largest over the observation window.

    The mean dilutes a token that a single row asks for, the largest does not; it sums to more than
    1. `topk_mass`, in both cases, is the mean over the rows of the sum of the `top_k` largest p of
    the tokens whose position is at least `num_sinks`, renormalised to sum to 1; it is 1 where no
    such token is left.

    Based on HybridKV (head classes by concentration); unlike the paper the sinks are taken out
    before the sum, because they make every head look concentrated.

    Args:
        probe: [M, Hq, D], float32, bfloat16 or float16, rotated to one common position; M >= 1.
        heads: of one request; a head may be empty (its `mass` is 0).
        scale: of the logits, 1 / sqrt(D) in most models; or how else they become weights.
        top_k: tokens in the top-k mass, at least 1; all if a head has fewer.
        num_sinks: positions below it are sinks.
        takes_largest: `mass` is of the largest p over the rows instead of their mean.
        max_tokens: n, width of the result, at least the largest of `lens`.

    Returns:
        Scores. Nothing is mutated.

    Raises:
        ValueError: a shape, dtype or number does not fit.
    """
    require_request(heads)
    if probe.dim() != 3 or probe.shape[0] < 1 or probe.shape[1] % heads.num_heads:
        raise ValueError(
            f"probe {list(probe.shape)} must be [M >= 1, Hq, D] with Hq a multiple of the "
            f"{heads.num_heads} KV heads of the table"
        )
    pool = heads.pool
    require("probe", probe, probe.dtype, (None, None, pool.layout.head_size))
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    require_width(max_tokens, heads)
    softmax = Softmax.of(scale)
    require_softmax(softmax, probe.shape[1])
    numbers = (softmax, top_k, num_sinks, takes_largest, max_tokens)
    match backend.of(probe):
        case "reference":
            return Scores(*score_reference(probe, heads, *numbers))
        case "triton":
            from vllm_budgetkv.ops.triton.score import score as score_triton

            return Scores(*score_triton(probe, heads, *numbers))
        case "cpp":
            extension.load()
            fields = (pool.keys, pool.values, pool.positions)
            tables = (heads.table, heads.lens)
            asked = (*softmax, *numbers[1:])
            return Scores(*torch.ops.budgetkv.score(probe, *fields, *tables, *asked))
