"""`encode` in Triton: one launch, one program per index page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import require_dense
from vllm_budgetkv.ops.triton.index import (
    CODE_BITS,
    CODES_PER_WORD,
    MAX_CODE,
    Index,
    count_tokens,
    find_page,
    find_shape,
    load_coded,
)
from vllm_budgetkv.ops.triton.tier import Tier, find_keys

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import RecallHeads, TierLayer

# elements of a tile of keys
TILE_SIZE = 8192
MAX_BLOCK_ENTRIES = 64
# of the best uniform quantiser of 16 levels, in deviations: see the op
STEP: tl.constexpr = tl.constexpr(0.3352)
# below it a number of float32 is not normal
SMALLEST_STEP: tl.constexpr = tl.constexpr(2.0**-126)


def encode(
    slot: int, tier: TierLayer, recalls: RecallHeads, pool: PagePool, energy: torch.Tensor
) -> None:
    """See `vllm_budgetkv.ops.encode.encode`.

    A GPU cannot refuse: pages out of range are left out, and tokens without a block.
    """
    _, num_heads, width_pages = recalls.table.shape
    if num_heads == 0 or width_pages == 0:
        return
    require_dense(energy=energy)
    layout = pool.layout
    block_size = triton.next_power_of_2(layout.head_size)
    encode_kernel[(width_pages, num_heads)](
        Tier.of(tier),
        Index.of(pool, recalls),
        energy,
        energy.stride(0),
        slot,
        TIER_TOKENS=tier.page_tokens,
        PAGE_WORDS=layout.page_words,
        HEAD_SIZE=layout.head_size,
        NUM_WORDS=layout.code_words,
        BLOCK_SIZE=block_size,
        BLOCK_WORDS=triton.next_power_of_2(layout.code_words),
        BLOCK_ENTRIES=min(MAX_BLOCK_ENTRIES, TILE_SIZE // block_size),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["slot"])
def encode_kernel(
    tier: tl.tuple,
    index: tl.tuple,
    energy: tl.tensor,
    energy_stride: tl.tensor,
    slot: tl.tensor,
    TIER_TOKENS: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
) -> None:
    """Grid [I, H]: reads the keys of a page for the digest, then what is coded of them."""
    number, head, slot = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.cast(slot, tl.int64)
    entry_tokens, _, page_tokens = find_shape(index, slot, head, PAGE_WORDS, NUM_WORDS)
    first = number * page_tokens
    count = tl.minimum(count_tokens(index, slot, head, page_tokens) - first, page_tokens)
    page, is_page = find_page(index, slot, head, number, count > 0)
    if (count <= 0) | (is_page == 0):
        return
    entries = (slot, head, first, count, entry_tokens)
    TYPE: tl.constexpr = index.digest.dtype.element_ty
    # fmt: off
    mean, variance = _measure(
        tier, entries, TIER_TOKENS, HEAD_SIZE, BLOCK_SIZE, BLOCK_ENTRIES, TYPE
    )
    # fmt: on
    channel = tl.arange(0, BLOCK_SIZE)
    is_channel = channel < HEAD_SIZE
    weight = tl.load(energy + head * energy_stride + channel, mask=is_channel, other=0.0) * variance
    digest = index.digest + page * index.stride
    _write_digest(digest, mean, variance, weight, HEAD_SIZE, NUM_WORDS, BLOCK_SIZE)
    # every thread reads what others wrote
    tl.debug_barrier()
    codes = index.words + page * index.word_stride
    # fmt: off
    _write_codes(
        tier, digest, codes, entries, TIER_TOKENS, HEAD_SIZE, NUM_WORDS, BLOCK_WORDS, BLOCK_ENTRIES,
        TYPE,
    )
    # fmt: on


@triton.jit
def _average_keys(
    tier: tl.tuple,
    entries: tl.tuple,
    entry: tl.tensor,
    channel: tl.tensor,
    is_channel: tl.tensor,
    TIER_TOKENS: tl.constexpr,
    TYPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """float32 [entries, channels] of the mean of each entry's keys, and which entries have keys.

    Means are rounded to TYPE, that of digests. `entries` are slot and head, the first token of a
    page, its tokens, and those of an entry.
    """
    slot, head, first, count, entry_tokens = entries
    total = tl.zeros([entry.shape[0], channel.shape[0]], tl.float32)
    num_keys = tl.zeros([entry.shape[0]], tl.float32)
    for neighbour in range(0, entry_tokens):
        token = entry * entry_tokens + neighbour
        place, held = find_keys(tier, slot, head, first + token, token < count, TIER_TOKENS)
        mask = held[:, None] & is_channel[None, :]
        where = tier.data + place[:, None] + channel[None, :]
        total += tl.load(where, mask=mask, other=0.0).to(tl.float32)
        num_keys += held.to(tl.float32)
    divisor = tl.broadcast_to(tl.maximum(num_keys, 1.0)[:, None], total.shape)
    mean = tl.div_rn(total, divisor)
    return mean.to(TYPE).to(tl.float32), num_keys > 0.0


@triton.jit
def _measure(
    tier: tl.tuple,
    entries: tl.tuple,
    TIER_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    TYPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Mean and variance of each channel over the entries of a page.

    Host memory is far, so the keys are read once: each block's mean and squares are joined to those
    of the blocks before it (Chan et al., 1979).
    """
    channel = tl.arange(0, BLOCK_SIZE)
    is_channel = channel < HEAD_SIZE
    so_far = tl.full([], 0.0, tl.float32)
    mean = tl.zeros([BLOCK_SIZE], tl.float32)
    squares = tl.zeros([BLOCK_SIZE], tl.float32)
    for begin in range(0, tl.cdiv(entries[3], entries[4]), BLOCK_ENTRIES):
        entry = begin + tl.arange(0, BLOCK_ENTRIES)
        # fmt: off
        keys, has_keys = _average_keys(
            tier, entries, entry, channel, is_channel, TIER_TOKENS, TYPE
        )
        # fmt: on
        new = tl.sum(has_keys.to(tl.float32))
        total = tl.maximum(so_far + new, 1.0)
        block_mean = tl.sum(keys, 0) / tl.maximum(new, 1.0)
        mask = has_keys[:, None] & is_channel[None, :]
        centred = tl.where(mask, keys - block_mean[None, :], 0.0)
        apart = block_mean - mean
        squares += tl.sum(centred * centred, 0) + apart * apart * (so_far * new / total)
        mean += apart * (new / total)
        so_far += new
    return mean, squares / tl.maximum(so_far, 1.0)


@triton.jit
def _write_digest(
    digest: tl.tensor,
    mean: tl.tensor,
    variance: tl.tensor,
    weight: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """Writes the means, and the steps and numbers of the channels with the largest weight."""
    NUM_CODED: tl.constexpr = NUM_WORDS * CODES_PER_WORD
    channel = tl.arange(0, BLOCK_SIZE)
    is_channel = channel < HEAD_SIZE
    weight = tl.where(is_channel, weight, float("-inf"))
    mine, other = weight[:, None], weight[None, :]
    is_lower = channel[None, :] < channel[:, None]
    rank = tl.sum(((other > mine) | ((other == mine) & is_lower)).to(tl.int32), 1)
    # with a weight that is no number more than these may have such a rank
    is_coded = is_channel & (rank < NUM_CODED)
    number = tl.cumsum(is_coded.to(tl.int32), 0) - 1
    is_coded = is_coded & (number < NUM_CODED)
    tl.store(digest + channel, mean, mask=is_channel)
    steps = digest + HEAD_SIZE + number
    tl.store(steps, tl.sqrt_rn(variance) * STEP, mask=is_coded)
    tl.store(steps + NUM_CODED, channel.to(tl.float32), mask=is_coded)


@triton.jit
def _write_codes(
    tier: tl.tuple,
    digest: tl.tensor,
    codes: tl.tensor,
    entries: tl.tuple,
    TIER_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    TYPE: tl.constexpr,
) -> None:
    """The codes are of what the digest says: numbers of the digests' type."""
    NUM_CODED: tl.constexpr = NUM_WORDS * CODES_PER_WORD
    BLOCK_CODED: tl.constexpr = BLOCK_WORDS * CODES_PER_WORD
    number, word = tl.arange(0, BLOCK_CODED), tl.arange(0, BLOCK_WORDS)
    is_coded = number < NUM_CODED
    step, channel = load_coded(digest, number, is_coded, HEAD_SIZE, NUM_WORDS)
    mean = tl.load(digest + channel, mask=is_coded, other=0.0).to(tl.float32)[None, :]
    step = tl.maximum(step, SMALLEST_STEP)[None, :]
    for begin in range(0, tl.cdiv(entries[3], entries[4]), BLOCK_ENTRIES):
        entry = begin + tl.arange(0, BLOCK_ENTRIES)
        keys, has_keys = _average_keys(tier, entries, entry, channel, is_coded, TIER_TOKENS, TYPE)
        level = tl.floor(tl.div_rn(keys - mean, tl.broadcast_to(step, keys.shape)) + 8.0)
        code = tl.minimum(tl.maximum(level, 0.0), 1.0 * MAX_CODE).to(tl.int32)
        code = (
            tl.where(is_coded[None, :], code, 0) << (number % CODES_PER_WORD * CODE_BITS)[None, :]
        )
        words = tl.sum(tl.reshape(code, (BLOCK_ENTRIES, BLOCK_WORDS, CODES_PER_WORD)), 2)
        to = codes + entry[:, None] * NUM_WORDS + word[None, :]
        tl.store(to, words, mask=has_keys[:, None] & (word < NUM_WORDS)[None, :])
