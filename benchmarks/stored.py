"""8-bit keys and values beside those as computed: quotas of equal bytes, and what each run lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from vllm_budgetkv.arithmetic.layout import PageLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

AUTO, FP8 = "auto", "fp8"
# what the models of both labs are published in: what their keys and values take without 8 bits
DTYPE = "bfloat16"
MIB = 2**20


class Stored(Protocol):
    """A result, of whichever lab."""

    @property
    def name(self) -> str: ...
    @property
    def quota_share(self) -> float | None: ...
    @property
    def quota_blocks(self) -> int: ...
    @property
    def peak_blocks(self) -> float: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def cache_dtype(self) -> str: ...


Result = TypeVar("Result", bound=Stored)


def same_bytes_tokens(quota_tokens: int, page_tokens: int, head_size: int) -> int:
    """Tokens in 8 bits, whole pages, that take no more bytes than a quota in `DTYPE`.

    Args:
        quota_tokens: whole pages.
        page_tokens: tokens of a page.
        head_size: elements of a key.
    """
    dtype = getattr(torch, DTYPE)
    plain, quantised = (PageLayout(page_tokens, head_size, dtype, q) for q in (False, True))
    quota_bytes = quota_tokens // page_tokens * plain.page_bytes
    return quota_bytes // quantised.page_bytes * page_tokens


def base_of(result: Result, results: Sequence[Result]) -> Result | None:
    """The result that one in 8 bits is held against; None for one that is not in 8 bits.

    It has the same name, stored as computed, with as many tokens, or else with the most among
    those that have fewer.
    """
    if result.cache_dtype == AUTO:
        return None
    share = result.quota_share or 0.0
    bases = [r for r in results if r.name == result.name and r.cache_dtype == AUTO]
    fewer = [r for r in bases if (r.quota_share or 0.0) <= share]
    return max(fewer, key=lambda r: r.quota_share or 0.0, default=None)


def settings(result: Stored, page_tokens: int) -> list[str]:
    """Cells of a row: quota, bits of an element, and bytes held at most."""
    share = result.quota_share
    tokens = f"{result.quota_blocks * page_tokens:,} tokens"
    held_bytes = result.peak_blocks * result.block_bytes
    return [
        "" if share is None else f"{100 * share:.3g} %, {tokens}",
        "16 bits" if result.cache_dtype == AUTO else "8 bits",
        f"{held_bytes / MIB:.3g} MiB" if held_bytes else "",
    ]


def lost_and_gained(base: Sequence[bool], found: Sequence[bool]) -> str:
    """How many answers are right in the base alone, and how many in the other alone."""
    pairs = list(zip(base, found, strict=True))
    lost = sum(a and not b for a, b in pairs)
    gained = sum(b and not a for a, b in pairs)
    return f"{lost}, {gained}"
