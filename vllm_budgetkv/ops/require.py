"""The check of an op's arguments, made before a kernel trusts their sizes."""

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
