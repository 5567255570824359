"""Random caches and the error budget of the op tests.

All memory that an op must not read is poisoned: free pages, the slots behind the last token of a
page, the other layers' table entries. An op that reads it returns NaN or an index error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.arithmetic.layout import PageLayout, PagePool
from vllm_budgetkv.ops import BatchRows, FreeStack, PagedHeads, Softmax

if TYPE_CHECKING:
    from collections.abc import Sequence

BAD_PAGE = 2**30
NUM_LAYERS = 2  # tables are views of one layer out of two, so they are not contiguous


@dataclass
class Cache:
    """One layer's tables over a pool, of which ops take views. Shapes as in docs/kv_layout.md."""

    pool: PagePool
    table: torch.Tensor
    lens: torch.Tensor
    free_pages: torch.Tensor
    num_free: torch.Tensor

    @property
    def heads(self) -> PagedHeads:
        """Of all slots."""
        return PagedHeads(self.pool, self.table, self.lens)

    @property
    def stack(self) -> FreeStack:
        """Of all slots."""
        return FreeStack(self.free_pages, self.num_free)

    def heads_of(self, slot: int) -> PagedHeads:
        return PagedHeads(self.pool, self.table[slot], self.lens[slot])

    def stack_of(self, slot: int) -> FreeStack:
        return FreeStack(self.free_pages[slot], self.num_free[slot : slot + 1])

    def clone(self) -> Cache:
        """A copy that shares no memory; the tables keep their strides."""
        copies = (
            copy_with_strides(tensor) for tensor in vars(self).values() if tensor is not self.pool
        )
        return Cache(PagePool(self.pool.raw.clone(), self.pool.layout), *copies)

    def head(self, slot: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of one head in the order of its tokens, [n, D] each, copied."""
        num_tokens = int(self.lens[slot, head])
        num_pages = -(-num_tokens // self.pool.layout.page_tokens)
        pages = self.table[slot, head, :num_pages].long()
        keys, values = self.pool.keys[pages], self.pool.values[pages]
        return keys.flatten(0, 1)[:num_tokens], values.flatten(0, 1)[:num_tokens]


def copy_with_strides(view: torch.Tensor) -> torch.Tensor:
    copy = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype)
    return copy.copy_(view)


def is_same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """`torch.equal`, of 8-bit floats too, which torch cannot compare as a whole."""
    assert actual.dtype == expected.dtype
    return torch.equal(*(t.float() if t.element_size() == 1 else t for t in (actual, expected)))


def int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def both_ways(num_tokens: int, *pictures: tuple[int, int]) -> torch.Tensor:
    """int32 [T]: what is ahead of the tokens of a batch, some of which see their picture whole.

    Args:
        num_tokens: of the batch.
        pictures: the first token of each in the batch, and the one behind it.
    """
    ahead = torch.zeros(num_tokens, dtype=torch.int32)
    for first, stop in pictures:
        ahead[first:stop] = torch.arange(stop - first - 1, -1, -1)
    return ahead


def batch_rows(
    slots: Sequence[int], tokens: Sequence[int], shared: Sequence[bool] | None = None
) -> BatchRows:
    """Rows of these numbers of tokens; first positions are 100, 200, ...; shared unless said."""
    starts = [sum(tokens[:row]) for row in range(len(tokens) + 1)]
    positions = [100 * (row + 1) for row in range(len(tokens))]
    flags = torch.tensor([True] * len(tokens) if shared is None else shared)
    return BatchRows(int32(slots), int32(starts), int32(positions), flags)


def layer_view(shape: Sequence[int], fill: int) -> torch.Tensor:
    """int32 `[S, ...]`: the last layer of an `[S, L, ...]` tensor; other layers hold BAD_PAGE."""
    storage = torch.full((shape[0], NUM_LAYERS, *shape[1:]), BAD_PAGE, dtype=torch.int32)
    storage[:, -1] = fill
    return storage[:, -1]


def make_cache(
    lens: Sequence[Sequence[int]],
    layout: PageLayout,
    *,
    table_pages: int | None = None,
    free_pages: int = 8,
    seed: int = 0,
) -> Cache:
    """A cache of random tokens in shuffled pages.

    Args:
        lens: tokens of each head, [S][H].
        layout: of the pool.
        table_pages: width of the table (W); default: 4 more than the longest head needs.
        free_pages: pages on each slot's free stack.
        seed: of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    page_tokens = layout.page_tokens
    held = [[-(-tokens // page_tokens) for tokens in heads] for heads in lens]
    num_slots, num_heads = len(lens), len(lens[0])
    num_pages = sum(map(sum, held)) + num_slots * free_pages + 3
    pool = PagePool(torch.empty(num_pages, layout.page_bytes, dtype=torch.uint8), layout)
    pool.poison()
    shuffled = iter(torch.randperm(num_pages, generator=generator).tolist())

    width = table_pages if table_pages is not None else max(map(max, held)) + 4
    table = layer_view((num_slots, num_heads, width), -1)
    lens_view = layer_view((num_slots, num_heads), 0)
    stack = torch.full((num_slots, free_pages + 2), BAD_PAGE, dtype=torch.int32)
    for slot in range(num_slots):
        for head in range(num_heads):
            pages = [next(shuffled) for _ in range(held[slot][head])]
            table[slot, head, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            lens_view[slot, head] = lens[slot][head]
            fill_pages(pool, pages, lens[slot][head], generator)
        free = [next(shuffled) for _ in range(free_pages)]
        stack[slot, :free_pages] = torch.tensor(free, dtype=torch.int32)
    num_free = torch.full((num_slots,), free_pages, dtype=torch.int32)
    return Cache(pool, table, lens_view, stack, num_free)


def fill_pages(
    pool: PagePool, pages: list[int], num_tokens: int, generator: torch.Generator
) -> None:
    """Random tokens at increasing positions with gaps, as after an eviction. Mutates the pool."""
    page_tokens, head_size = pool.layout.page_tokens, pool.layout.head_size
    gaps = torch.randint(1, 4, (num_tokens,), generator=generator)
    positions = gaps.cumsum(0).to(torch.int32) - 1
    for index, page in enumerate(pages):
        tokens = min(page_tokens, num_tokens - index * page_tokens)
        shape, kv_dtype = (tokens, head_size), pool.layout.kv_dtype
        pool.keys[page, :tokens] = torch.randn(shape, generator=generator).to(kv_dtype)
        pool.values[page, :tokens] = torch.randn(shape, generator=generator).to(kv_dtype)
        pool.positions[page, :tokens] = positions[index * page_tokens :][:tokens]


def strided_randn(
    shape: Sequence[int], dtype: torch.dtype, *, seed: int, scale: float = 1.0
) -> torch.Tensor:
    """Random `[T, H, D]` whose tokens lie further apart than H * D, as in a fused QKV tensor."""
    generator = torch.Generator().manual_seed(seed)
    tokens, heads, size = shape
    fused = torch.full((tokens, heads + 2, size), torch.nan, dtype=dtype)
    fused[:, 1:-1] = (torch.randn(tuple(shape), generator=generator) * scale).to(dtype)
    return fused[:, 1:-1]


# what a stored 1 of quantised pages stands for: no power of two
UNIT = 0.7

# kinds of `Softmax`, but for the plain one: with the tests' keys logits reach 3 and more
SOFTMAXES = ("cap", "sinks", "cap-and-sinks")


def softmax_of(kind: str, head_size: int, num_query_heads: int, unit: float = 1.0) -> Softmax:
    """A `Softmax` of a kind; sinks from far below all logits to far above them.

    A stored key of 1 stands for `unit`, and so does a stored value.
    """
    generator = torch.Generator().manual_seed(3)
    sinks = torch.randn(num_query_heads, generator=generator) * 3
    sinks[::5], sinks[3::5] = -300.0, 300.0
    return Softmax(
        unit * head_size**-0.5,
        soft_cap=1.5 if "cap" in kind else 0.0,
        sinks=sinks if "sinks" in kind else None,
        value_unit=unit,
    )


def assert_within_budget(
    actual: torch.Tensor,
    low_precision: torch.Tensor,
    exact: torch.Tensor,
    *,
    rounding_steps: float = 1.0,
) -> None:
    """The kernel may err at most twice as much as plain torch in the same precision does.

    Budget: `2 * (max |low_precision - exact| + rounding steps of the output)`.

    Args:
        actual: what the kernel returned, any shape, output dtype.
        low_precision: the reference, computed in float32 and rounded to the output dtype.
        exact: the reference in float64 on the same inputs.
        rounding_steps: of the output, more than one where a rounded input may make as many.
    """
    assert actual.dtype == low_precision.dtype
    assert actual.double().isfinite().all()
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    low_error = (low_precision.double() - exact).abs().max().item()
    allowed = 2 * (low_error + rounding_steps * rounding)
    error = (actual.double() - exact).abs().max().item()
    assert error <= allowed, f"error {error:.3e} exceeds the budget {allowed:.3e}"
