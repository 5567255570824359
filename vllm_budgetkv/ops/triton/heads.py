"""The tables of the heads that `compact`, `digest` and `merge` work on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_budgetkv.ops.triton.arguments import require_dense

if TYPE_CHECKING:
    import torch


class Heads(NamedTuple):
    """Page table [H, W], whose last stride is 1, and lengths [H] of one request.

    H may run over the heads of several layers, layer by layer: [L, H, W] flattened.
    """

    table: Any
    lens: Any
    stride: Any
    lens_stride: Any

    @classmethod
    def of(cls, table: torch.Tensor, lens: torch.Tensor) -> Heads:
        require_dense(table=table)
        return cls(table, lens, table.stride(0), lens.stride(0))
