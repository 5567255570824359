"""What the user of `plan` asks for, and how it is told that it cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_budgetkv.start.config import bytes_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Self


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The options of `plan` itself.

    Args:
        model: name or folder.
        tokens: of the longest request, prompt and answer; None for as many as may be.
        concurrency: requests of that length that shall run at once.
        gpu_bytes: memory of a GPU; None if it was not said.
        weights_bytes: of all weights; None to read them.
        reserve_bytes: memory of a GPU for what no configuration tells.
        server: every other argument, for vLLM to read.

    Raises:
        ValueError: a number or size is out of range.
    """

    model: str
    tokens: int | None
    concurrency: int
    gpu_bytes: int | None
    weights_bytes: int | None
    reserve_bytes: int
    server: tuple[str, ...]

    def __post_init__(self) -> None:
        for flag, count in (("--tokens", self.tokens), ("--concurrency", self.concurrency)):
            if count is not None and count < 1:
                raise ValueError(f"{flag} must be at least 1; got {count}")

    @classmethod
    def of(cls, options: argparse.Namespace, server: Sequence[str]) -> Self:
        """From the parsed options of `plan` and the arguments that it did not know."""

        def size(flag: str, text: str | None) -> int | None:
            return None if text is None else bytes_of(text, flag)

        return cls(
            model=options.model,
            tokens=options.tokens,
            concurrency=options.concurrency,
            gpu_bytes=size("--gpu-memory", options.gpu_memory),
            weights_bytes=size("--weights", options.weights),
            reserve_bytes=bytes_of(options.reserve, "--reserve"),
            server=tuple(server),
        )


def in_words(error: Exception) -> str:
    """The message of an error without what surrounds it.

    vLLM checks its configurations with pydantic, which wraps a sentence in three lines of its own.
    """
    found = getattr(error, "errors", None)
    if not callable(found):
        return str(error)
    return "\n".join(str(item["msg"]).removeprefix("Value error, ") for item in found())
