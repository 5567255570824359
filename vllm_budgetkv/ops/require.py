"""The checks of an op's arguments, made before a kernel trusts their sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
    fits = tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; pass {dtype} [{wanted}]")


def require_width(max_tokens: int, table: torch.Tensor, page_tokens: int) -> None:
    """Refuse a result that is wider than the page table [H, W] has room for tokens.

    Raises:
        ValueError: with the width and the room.
    """
    capacity_tokens = table.shape[1] * page_tokens
    if not 0 <= max_tokens <= capacity_tokens:
        raise ValueError(
            f"max_tokens is {max_tokens}; a table of {table.shape[1]} pages of {page_tokens} "
            f"tokens holds from 0 to {capacity_tokens}"
        )
