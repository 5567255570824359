"""What is ahead of the tokens of a batch, some of which attend to all of their picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.arithmetic import pictures
from vllm_budgetkv.cache.upload import upload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_budgetkv.cache.requests import RowPlan


def tokens_ahead(
    plans: Sequence[RowPlan],
    starts: Sequence[int],
    pictures_of: Mapping[int, Sequence[pictures.Range]],
    device: torch.device,
) -> torch.Tensor | None:
    """Tokens behind it that each token of a batch sees, int32 [T]; None if none sees any.

    Args:
        plans: of all rows.
        starts: first token of each row, and T.
        pictures_of: rows, by their index, to the pictures of their prompts.
        device: of the result.

    Raises:
        RuntimeError: a chunk ends inside of a picture, whose answer would be another.
    """
    ahead = [0] * starts[-1]
    for row, found in pictures_of.items():
        if row >= len(plans) or not found:
            continue
        start_tokens, num_tokens = plans[row].request.computed_tokens, plans[row].num_tokens
        try:
            of_row = pictures.tokens_ahead(start_tokens, num_tokens, found)
        except ValueError as error:
            raise RuntimeError(
                f"vLLM cut a picture whose tokens attend both ways: {error}; start without "
                "--kv-policy"
            ) from error
        ahead[starts[row] : starts[row + 1]] = of_row
    return upload(ahead, torch.int32, device) if any(ahead) else None
