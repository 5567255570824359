"""What the ops take: heads and their pages, free stacks, rows of a batch.

A view names tensors that lie elsewhere. Making one copies nothing and allocates nothing on a
device, so it may be made in a decode step and under a graph's capture. What is checked of a view
is in `require.py`; the legend of shapes is docs/kv_layout.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.arithmetic.layout import PagePool


class PagedHeads(NamedTuple):
    """Heads, and in which pages of a pool their tokens are.

    Either one layer of all slots, [S, H, ...], or heads of one request, [H, ...]. H may run over
    the heads of several layers, layer by layer.

    Attributes:
        pool: the head-pages.
        table: int32 [S, H, W] or [H, W], pages of each head in the order of its tokens; -1 behind
            the last one. May be strided, but not in its last dimension.
        lens: int32 [S, H] or [H], tokens of each head; may be strided.
    """

    pool: PagePool
    table: torch.Tensor
    lens: torch.Tensor

    @property
    def page_tokens(self) -> int:
        """Tokens of a page (N)."""
        return self.pool.layout.page_tokens

    @property
    def num_heads(self) -> int:
        return self.table.shape[-2]

    @property
    def width_pages(self) -> int:
        return self.table.shape[-1]

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the table has room for, of each head."""
        return self.width_pages * self.page_tokens


class Softmax(NamedTuple):
    """How logits become weights, where a scale alone does not say it.

    A logit is `scale * q.k`, or with a soft cap C (Gemma 2, https://arxiv.org/abs/2408.00118) the
    number `C tanh(scale * q.k / C)`. A learned sink (gpt-oss, https://arxiv.org/abs/2508.10925) is
    the logit of a token without key and value: it takes a share of the weights and gives nothing.

    Attributes:
        scale: of the logits, usually 1 / sqrt(D); times the unit of the keys, if they have one.
        soft_cap: C, positive; 0 for none.
        sinks: float32 [Hq], of each query head; None without.
        value_unit: what a stored value of 1 stands for.
    """

    scale: float
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
    value_unit: float = 1.0

    @classmethod
    def of(cls, scale: float | Softmax) -> Softmax:
        """The same of a scale alone."""
        return scale if isinstance(scale, Softmax) else cls(scale)


class FreeStack(NamedTuple):
    """Free head-pages, a stack for each slot or that of one request.

    Attributes:
        free_pages: int32 [S, F] or [F]. The top is at `num_free - 1`; what is above means nothing.
        num_free: int32 [S] or [1], height of each stack.
    """

    free_pages: torch.Tensor
    num_free: torch.Tensor


class BatchRows(NamedTuple):
    """Rows of a batch, each the new tokens of one request.

    Row `r` has `t = query_start[r + 1] - query_start[r]` tokens; `t = 0` is padding.

    Attributes:
        slots: int32 [R], where each row's request stands in the tables of all slots.
        query_start: int32 [R + 1], first token of each row among the T of the batch, ascending.
        first_position: int32 [R], logical index in its request of each row's first token.
        shared: bool [R], rows that take new pages from their free stack; the table of another row
            names its pages already.
    """

    slots: torch.Tensor
    query_start: torch.Tensor
    first_position: torch.Tensor
    shared: torch.Tensor


class TierLayer(NamedTuple):
    """One layer of the tokens that host memory keeps, of all slots.

    Attributes:
        tokens: [B, H, 2, N, D], keys and values of B host blocks of N tokens, as pages store them;
            blocks may lie apart. On a GPU's host, pinned memory that kernels read and write.
        blocks: int32 [S, M], the blocks of each slot's tokens in their order; -1 where it has none.
    """

    tokens: torch.Tensor
    blocks: torch.Tensor

    @property
    def page_tokens(self) -> int:
        """Tokens of a block (N)."""
        return self.tokens.shape[-2]


class RecallHeads(NamedTuple):
    """What heads know of the tokens that host memory keeps, of one layer of all slots.

    Attributes:
        table: int32 [S, H, I], index pages of each head; -1 behind the last one.
        num_tokens: int32 [S, H], tokens that they speak for; 0 for a head that recalls nothing.
        num_recalled: int32 [S, H], tokens of the head's first pages that are recalled: whole pages.
        entry_tokens: int32 [S, H], tokens that an entry of the index speaks for (g).
    """

    table: torch.Tensor
    num_tokens: torch.Tensor
    num_recalled: torch.Tensor
    entry_tokens: torch.Tensor


class PageChoice(NamedTuple):
    """How many pages a dynamic head reads, and which of them in any case.

    Attributes:
        keep_ratio: share of its pages, in (0, 1].
        sink_pages: first pages, always read.
        window_pages: last pages, always read, at least 1 (they may have no digest yet).
    """

    keep_ratio: float
    sink_pages: int
    window_pages: int
