"""Warnings that are said once, however many requests meet their cause."""

from __future__ import annotations

import functools
import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# a child of vLLM's logger, which alone has a handler
logger = logging.getLogger("vllm.plugins.budgetkv")


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, the first time only; inside `except`, with the error that led to it.

    Args:
        message: without what differs between requests, which would make it another one.
    """
    error = sys.exception()
    reason = f" ({type(error).__name__}: {error})" if error is not None else ""
    logger.warning("budgetkv: %s%s; this is said once", message, reason)


@contextmanager
def reporting(failure: str) -> Iterator[None]:
    """What only reports does not end a request: an error inside is said once, and is over."""
    try:
        yield
    except Exception:  # noqa: BLE001
        warn_once(failure)
