"""The checks of an op's arguments, made before a kernel trusts their sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import (
        BatchRows,
        FreeStack,
        PagedHeads,
        RecallHeads,
        Softmax,
        TierLayer,
    )


def require(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> None:
    """Refuse a tensor whose dtype or shape is not the one that the op reads.

    Args:
        name: of the argument, for the message.
        tensor: the argument.
        dtype: that it must have.
        shape: that it must have; None accepts any extent.

    Raises:
        ValueError: with the name, what was given and what is needed.
    """
    extents = tensor.shape
    # every op of a decode step passes here, and to compare whole shapes takes a third of the time
    fits = extents == shape or (
        len(extents) == len(shape)
        and all(want is None or want == have for want, have in zip(shape, extents, strict=True))
    )
    if tensor.dtype != dtype or not fits:
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; pass {dtype} [{wanted}]")


def require_softmax(softmax: Softmax, num_query_heads: int) -> None:
    """Refuse sinks of other heads, and a cap that is none.

    Raises:
        ValueError: a shape, dtype or number does not fit.
    """
    if not softmax.value_unit > 0:
        raise ValueError(f"value_unit is {softmax.value_unit}; it must be positive")
    if not softmax.soft_cap >= 0:
        raise ValueError(f"soft_cap is {softmax.soft_cap}; it must be positive, or 0 for none")
    if softmax.sinks is not None:
        require("sinks", softmax.sinks, torch.float32, (num_query_heads,))


def require_layer(heads: PagedHeads) -> None:
    """Refuse heads that are not those of one layer of all slots, [S, H, W] and [S, H].

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require("table", heads.table, torch.int32, (None, None, None))
    require("lens", heads.lens, torch.int32, heads.table.shape[:2])


def require_request(heads: PagedHeads) -> None:
    """Refuse heads that are not those of one request, [H, W] and [H].

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require("table", heads.table, torch.int32, (None, None))
    require("lens", heads.lens, torch.int32, (heads.num_heads,))


def require_stacks(stack: FreeStack, heads: PagedHeads) -> None:
    """Refuse free stacks that are not one for each slot of these heads.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    num_slots = heads.table.shape[0]
    require("free_pages", stack.free_pages, torch.int32, (num_slots, None))
    require("num_free", stack.num_free, torch.int32, (num_slots,))


def require_rows(rows: BatchRows) -> None:
    """Refuse rows whose slots and tokens do not fit together; the rest is `append`'s to check.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require("slots", rows.slots, torch.int32, (None,))
    require("query_start", rows.query_start, torch.int32, (rows.slots.shape[0] + 1,))


def require_tier(tier: TierLayer, num_slots: int) -> None:
    """Refuse a tier that is not one layer, [B, H, 2, N, D], of so many slots.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require("tier.tokens", tier.tokens, tier.tokens.dtype, (None, None, 2, None, None))
    require("tier.blocks", tier.blocks, torch.int32, (num_slots, None))


def require_recalls(recalls: RecallHeads, slots_and_heads: tuple[int, ...]) -> None:
    """Refuse what does not tell every head of every slot what it recalls.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require("index", recalls.table, torch.int32, (*slots_and_heads, None))
    for name in ("num_tokens", "num_recalled", "entry_tokens"):
        require(name, getattr(recalls, name), torch.int32, slots_and_heads)


def require_width(max_tokens: int, heads: PagedHeads) -> None:
    """Refuse a result that is wider than the page table has room for tokens.

    Raises:
        ValueError: with the width and the room.
    """
    if not 0 <= max_tokens <= heads.capacity_tokens:
        raise ValueError(
            f"max_tokens is {max_tokens}; a table of {heads.width_pages} pages of "
            f"{heads.page_tokens} tokens holds from 0 to {heads.capacity_tokens}"
        )


def require_keep(keep: torch.Tensor, heads: PagedHeads) -> None:
    """Refuse marks that are not bool [H, n] with n tokens that the page table has room for.

    Raises:
        ValueError: a shape or dtype does not fit, or n is too large.
    """
    require("keep", keep, torch.bool, (heads.num_heads, None))
    if keep.shape[1] > heads.capacity_tokens:
        raise ValueError(
            f"keep has {keep.shape[1]} tokens per head; a table of {heads.width_pages} pages of "
            f"{heads.page_tokens} tokens holds {heads.capacity_tokens}"
        )


def require_moved(key: torch.Tensor, value: torch.Tensor, rows: BatchRows, tier: TierLayer) -> None:
    """Check what `store` and `load` take: keys and values of a batch, and a tier."""
    require_tier(tier, tier.blocks.shape[0])
    num_heads, head_size = tier.tokens.shape[1], tier.tokens.shape[-1]
    require("key", key, tier.tokens.dtype, (None, num_heads, head_size))
    require("value", value, tier.tokens.dtype, key.shape)
    require_rows(rows)
    require("first_position", rows.first_position, torch.int32, rows.slots.shape)
