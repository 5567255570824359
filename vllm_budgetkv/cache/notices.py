"""Warnings that are said once, however many requests meet their cause."""

from __future__ import annotations

import functools
import logging
import sys

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
