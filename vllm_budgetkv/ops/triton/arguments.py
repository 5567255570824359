"""Tensors and strides that kernels take together. Strides are in elements."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import FreeStack, PagedHeads, Softmax


class Pages(NamedTuple):
    """The fields of the head-pages; inside a page they are dense.

    `stride` leads from page to page in keys and values, whose elements may be narrower than those
    of digests, `digest_stride` in these, `word_stride` in positions.
    The names are singular because Triton's own tuples have an attribute `values`.
    """

    key: Any
    value: Any
    digest: Any
    position: Any
    stride: Any
    digest_stride: Any
    word_stride: Any

    @classmethod
    def of(cls, pool: PagePool) -> Pages:
        fields = (pool.keys, pool.values, pool.digests, pool.positions)
        return cls(*fields, *(field.stride(0) for field in fields if field is not pool.values))


class Tables(NamedTuple):
    """Page table [S, H, W] and lengths [S, H], whose last strides are 1."""

    table: Any
    lens: Any
    slot_stride: Any
    head_stride: Any
    lens_slot_stride: Any

    @classmethod
    def of(cls, heads: PagedHeads) -> Tables:
        _, table, lens = heads
        require_dense(table=table, lens=lens)
        return cls(table, lens, table.stride(0), table.stride(1), lens.stride(0))


class Weighing(NamedTuple):
    """A `Softmax` whose scale and cap are in units of log 2; the others are as they were.

    Without sinks it points anywhere, and no kernel looks.
    """

    scale: Any
    cap: Any
    sinks: Any
    value_unit: Any

    @classmethod
    def of(cls, softmax: Softmax, anywhere: torch.Tensor) -> Weighing:
        unit = math.log(2)
        sinks = anywhere if softmax.sinks is None else softmax.sinks
        require_dense(sinks=sinks)
        return cls(softmax.scale / unit, softmax.soft_cap / unit, sinks, softmax.value_unit)


class Stacks(NamedTuple):
    """Free stacks of all slots and their heights."""

    pages: Any
    heights: Any
    slot_stride: Any

    @classmethod
    def of(cls, stack: FreeStack) -> Stacks:
        require_dense(free_pages=stack.free_pages, num_free=stack.num_free)
        return cls(*stack, stack.free_pages.stride(0))


class Tokens(NamedTuple):
    """Vectors of tokens and heads, [T, H, D], whose last stride is 1."""

    data: Any
    stride: Any
    head_stride: Any

    @classmethod
    def of(cls, tokens: torch.Tensor) -> Tokens:
        require_dense(tokens=tokens)
        return cls(tokens, tokens.stride(0), tokens.stride(1))


def require_dense(**tensors: torch.Tensor) -> None:
    """Refuse a tensor whose last dimension is strided.

    Raises:
        ValueError: with its name and strides.
    """
    for name, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} {list(tensor.shape)} has strides {tensor.stride()}; "
                "its last dimension must be contiguous"
            )
