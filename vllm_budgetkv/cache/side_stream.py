"""Copies to host memory beside the forward, so that it waits for none of them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


class SideStream:
    """A stream of its own on a GPU; on a CPU what is launched runs at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self, *used: torch.Tensor) -> Iterator[None]:
        """What is launched inside waits for what was launched before, and nothing waits for it.

        Args:
            used: tensors that it reads; their memory is not given away before it has.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        for tensor in used:
            tensor.record_stream(self._stream)

    def join(self) -> None:
        """What is launched from now on waits for what runs beside."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
