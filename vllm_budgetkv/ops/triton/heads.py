"""The tables of the heads that `compact`, `digest` and `merge` work on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_budgetkv.ops.triton.arguments import require_dense

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads


class Heads(NamedTuple):
    """Page table [H, W], whose last stride is 1, and lengths [H] of one request.

    H may run over the heads of several layers, layer by layer: [L, H, W] flattened.
    """

    table: Any
    lens: Any
    stride: Any
    lens_stride: Any

    @classmethod
    def of(cls, heads: PagedHeads) -> Heads:
        _, table, lens = heads
        require_dense(table=table)
        return cls(table, lens, table.stride(0), lens.stride(0))
