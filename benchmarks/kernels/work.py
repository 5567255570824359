"""Bytes and operations that an op cannot do without, counted from its sizes.

Every input is read once and every output written once; scratch and second readings are left out,
so that a share of the card's bandwidth says how far a kernel is from the least. The formulas are
those of "GPU kernels: bytes and operations" in docs/performance.md, which has the legend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.arithmetic.layout import PageLayout

if TYPE_CHECKING:
    from benchmarks.kernels.shapes import ModelShape

DTYPE = torch.bfloat16
ELEMENT_BYTES = DTYPE.itemsize
WORD_BYTES = 4


@dataclass(frozen=True)
class Work:
    """Of one call.

    Attributes:
        bytes: through device memory.
        flops: of matrix products and their like.
        host_bytes: over the link to host memory.
    """

    bytes: float
    flops: float = 0.0
    host_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        host_bytes = self.host_bytes + other.host_bytes
        return Work(self.bytes + other.bytes, self.flops + other.flops, host_bytes)

    def __mul__(self, times: int) -> Work:
        return Work(self.bytes * times, self.flops * times, self.host_bytes * times)

    def floor_seconds(
        self,
        bytes_per_second: float,
        flops_per_second: float,
        host_bytes_per_second: float = math.inf,
    ) -> float:
        """The least time at these rates."""
        return max(
            self.bytes / bytes_per_second,
            self.flops / flops_per_second,
            self.host_bytes / host_bytes_per_second,
        )


def vector_bytes(model: ModelShape) -> int:
    """A key or a value of one token and KV head."""
    return model.head_size * ELEMENT_BYTES


def append(model: ModelShape, new_tokens: int) -> Work:
    """Reads K and V and writes them with a position."""
    per_head = 4 * vector_bytes(model) + WORD_BYTES
    return Work(new_tokens * model.kv_heads * per_head)


def reserve(heads: int) -> Work:
    """Of heads that all need a page: length and page in, table entry out."""
    return Work(3 * WORD_BYTES * heads)


def attend(model: ModelShape, rows: int, head_tokens: float, page_tokens: int) -> Work:
    """Decode over `head_tokens` tokens, summed over rows and KV heads."""
    keys = head_tokens * (2 * vector_bytes(model) + WORD_BYTES / page_tokens)
    queries = 2 * rows * model.heads * vector_bytes(model)
    return Work(keys + queries, 4 * model.group * model.head_size * head_tokens)


def attend_chunk(model: ModelShape, new_tokens: int, head_tokens: float, page_tokens: int) -> Work:
    """Prefill of `new_tokens`, which `head_tokens`, summed over KV heads, hold already."""
    once = attend(model, new_tokens, head_tokens, page_tokens)
    # token i of t sees all but the last t - i - 1
    seen = new_tokens * (head_tokens - model.kv_heads * (new_tokens - 1) / 2)
    return Work(once.bytes, 4 * model.group * model.head_size * seen)


def score(model: ModelShape, head_tokens: float, probe_rows: int) -> Work:
    """K for the logits, V for its norms; writes mass, norms and positions."""
    per_token = 2 * vector_bytes(model) + 4 * WORD_BYTES
    flops = 2 * probe_rows * model.group * model.head_size * head_tokens
    return Work(head_tokens * per_token, flops)


def contrast(model: ModelShape, head_tokens: float) -> Work:
    """Keys in, a number out; the length of each key and its product with the mean."""
    bytes_ = head_tokens * (vector_bytes(model) + WORD_BYTES)
    return Work(bytes_, 4 * model.head_size * head_tokens)


def logits_bytes(model: ModelShape, head_tokens: float, probe_rows: int) -> float:
    """The scratch of `score`, float32, which is written once and read once per launch after."""
    return WORD_BYTES * probe_rows * model.group * head_tokens


def select(head_tokens: float) -> Work:
    """Score and tier in, one byte out."""
    return Work(head_tokens * (WORD_BYTES + 1 + 1))


def compact(model: ModelShape, head_tokens: float, moved_tokens: float) -> Work:
    """Every token's mark, and the survivors that change their place, read and written."""
    per_token = 2 * (2 * vector_bytes(model) + WORD_BYTES)
    return Work(head_tokens + moved_tokens * per_token)


def digest(model: ModelShape, head_tokens: float, page_tokens: int) -> Work:
    """Keys in, two vectors per page out."""
    return Work(head_tokens * vector_bytes(model) * (1 + 2 / page_tokens))


def retrieve(model: ModelShape, head_pages: float) -> Work:
    """Two vectors and a table entry of every page in, a table entry out."""
    per_page = 2 * vector_bytes(model) + 2 * WORD_BYTES
    return Work(head_pages * per_page, 4 * model.group * model.head_size * head_pages)


def merge(model: ModelShape, kept_tokens: float, dropped_tokens: float, heads: int) -> Work:
    """Keys and values in, values out; a product of dropped and kept keys of every head."""
    head_tokens = kept_tokens + dropped_tokens
    moved = (2 * head_tokens + kept_tokens) * vector_bytes(model)
    return Work(moved, 2 * model.head_size * kept_tokens * dropped_tokens / heads)


def token_index_bytes(layout: PageLayout) -> float:
    """What an index says of a token: its codes, and its share of its page's digest."""
    digest = layout.head_size + 2 * layout.coded_channels
    return WORD_BYTES * layout.code_words + ELEMENT_BYTES * digest / layout.index_tokens(1)


def store(model: ModelShape, new_tokens: int) -> Work:
    """K and V from the device to host memory."""
    moved = 2 * new_tokens * model.kv_heads * vector_bytes(model)
    return Work(moved, host_bytes=moved)


def encode(model: ModelShape, heads: int, indexed_tokens: float, page_tokens: int) -> Work:
    """Keys from host memory and energy in, an index out; heads and tokens as in `recall`."""
    layout = PageLayout(page_tokens, model.head_size, DTYPE)
    energy = WORD_BYTES * heads * model.head_size
    written = indexed_tokens * token_index_bytes(layout)
    return Work(energy + written, host_bytes=indexed_tokens * vector_bytes(model))


def mark(indexed_tokens: float, held_tokens: float) -> Work:
    """A position of every token that is held in, a bit of every token out."""
    return Work(WORD_BYTES * held_tokens + indexed_tokens / 8)


def recall(
    model: ModelShape,
    heads: int,
    indexed_tokens: float,
    recalled_tokens: float,
    moved_tokens: float,
    page_tokens: int,
) -> Work:
    """Index, queries and positions of recall pages in, what moved from host memory out.

    Args:
        heads: KV heads that recall, over rows and layers; tokens are sums over them.
        indexed_tokens: that host memory keeps.
        recalled_tokens: that recall pages hold.
        moved_tokens: of these, those that were fetched.
    """
    layout = PageLayout(page_tokens, model.head_size, DTYPE)
    index = indexed_tokens * (token_index_bytes(layout) + 1 / 8)
    queries = heads * model.group * vector_bytes(model)
    moved = 2 * moved_tokens * vector_bytes(model)
    positions = WORD_BYTES * (recalled_tokens + moved_tokens)
    # of each token its coded channels, of each page its mean
    products = layout.coded_channels + model.head_size / layout.index_tokens(1)
    flops = 2 * model.group * products * indexed_tokens
    return Work(index + queries + positions + moved, flops, moved)
