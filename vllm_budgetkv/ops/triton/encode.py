"""`encode` in Triton: one launch, one program per index page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.index import CODES_PER_WORD, Index, count_tokens, find_page
from vllm_budgetkv.ops.triton.tier import Tier, find_keys

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PagePool
    from vllm_budgetkv.ops.views import RecallHeads, TierLayer

# elements of a tile of keys
TILE_SIZE = 8192
MAX_BLOCK_TOKENS = 64
# of the best uniform quantiser of 4 levels, in deviations: see the op
STEP: tl.constexpr = tl.constexpr(0.9957)
# below it a number of float32 is not normal
SMALLEST_STEP: tl.constexpr = tl.constexpr(2.0**-126)


def encode(slot: int, tier: TierLayer, recalls: RecallHeads, pool: PagePool) -> None:
    """See `vllm_budgetkv.ops.encode.encode`.

    A GPU cannot refuse: pages out of range are left out, and tokens without a block.
    """
    _, num_heads, width_pages = recalls.table.shape
    if num_heads == 0 or width_pages == 0:
        return
    layout = pool.layout
    block_words = triton.next_power_of_2(layout.code_words)
    encode_kernel[(width_pages, num_heads)](
        Tier.of(tier),
        Index.of(pool, recalls),
        slot,
        TIER_TOKENS=tier.page_tokens,
        INDEX_TOKENS=layout.index_tokens,
        HEAD_SIZE=layout.head_size,
        NUM_WORDS=layout.code_words,
        BLOCK_WORDS=block_words,
        BLOCK_TOKENS=min(MAX_BLOCK_TOKENS, TILE_SIZE // (block_words * CODES_PER_WORD.value)),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["slot"])
def encode_kernel(
    tier: tl.tuple,
    index: tl.tuple,
    slot: tl.tensor,
    TIER_TOKENS: tl.constexpr,
    INDEX_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Grid [I, H]: reads the keys of a page twice, for mean and step and for the codes.

    Tiles of keys are [tokens, words, codes of a word].
    """
    entry, head, slot = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.cast(slot, tl.int64)
    first = entry * INDEX_TOKENS
    count = tl.minimum(count_tokens(index, slot, head, INDEX_TOKENS) - first, INDEX_TOKENS)
    page, is_page = find_page(index, slot, head, entry, count > 0)
    count = tl.where(is_page, count, 0)
    if count <= 0:
        return
    lane, word = tl.arange(0, CODES_PER_WORD), tl.arange(0, BLOCK_WORDS)
    channel = word[:, None] * CODES_PER_WORD + lane[None, :]
    is_channel = channel < HEAD_SIZE
    # fmt: off
    mean, deviation = _measure(
        tier, slot, head, first, count, channel, is_channel, TIER_TOKENS, BLOCK_TOKENS
    )
    # fmt: on
    digest = index.digest + page * index.stride + channel
    # the codes are of what the page will say: numbers of the cache's type
    mean = mean.to(index.digest.dtype.element_ty)
    step = (deviation * STEP).to(index.digest.dtype.element_ty)
    tl.store(digest, mean, mask=is_channel)
    tl.store(digest + HEAD_SIZE, step, mask=is_channel)
    mean = mean.to(tl.float32)[None, :, :]
    step = tl.maximum(step.to(tl.float32), SMALLEST_STEP)[None, :, :]
    codes = index.codes + page * index.word_stride
    for begin in range(0, count, BLOCK_TOKENS):
        token = begin + tl.arange(0, BLOCK_TOKENS)
        place, held = find_keys(tier, slot, head, first + token, token < count, TIER_TOKENS)
        keys, mask = _load_tile(tier, place, held, channel, is_channel)
        level = tl.floor(tl.div_rn(keys - mean, tl.broadcast_to(step, keys.shape)) + 2.0)
        code = tl.minimum(tl.maximum(level, 0.0), 3.0).to(tl.int32)
        words = tl.sum(tl.where(mask, code, 0) << (2 * lane)[None, None, :], 2)
        where = codes + token[:, None] * NUM_WORDS + word[None, :]
        tl.store(where, words, mask=held[:, None] & (word < NUM_WORDS)[None, :])


@triton.jit
def _measure(
    tier: tl.tuple,
    slot: tl.tensor,
    head: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    channel: tl.tensor,
    is_channel: tl.tensor,
    TIER_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Mean and deviation of each channel over some tokens.

    Host memory is far, so the keys are read once: each block's mean and squares are joined to those
    of the blocks before it (Chan et al., 1979).
    """
    so_far = tl.full([], 0.0, tl.float32)
    mean = tl.zeros(channel.shape, tl.float32)
    squares = tl.zeros(channel.shape, tl.float32)
    for begin in range(0, count, BLOCK_TOKENS):
        token = begin + tl.arange(0, BLOCK_TOKENS)
        place, held = find_keys(tier, slot, head, first + token, token < count, TIER_TOKENS)
        keys, mask = _load_tile(tier, place, held, channel, is_channel)
        new = tl.sum(held.to(tl.float32))
        total = tl.maximum(so_far + new, 1.0)
        block_mean = tl.sum(keys, 0) / tl.maximum(new, 1.0)
        centred = tl.where(mask, keys - block_mean[None, :, :], 0.0)
        apart = block_mean - mean
        squares += tl.sum(centred * centred, 0) + apart * apart * (so_far * new / total)
        mean += apart * (new / total)
        so_far += new
    return mean, tl.sqrt_rn(squares / tl.maximum(so_far, 1.0))


@triton.jit
def _load_tile(
    tier: tl.tuple,
    place: tl.tensor,
    held: tl.tensor,
    channel: tl.tensor,
    is_channel: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """float32 keys of a block of tokens, 0 where there is none, and where there is one."""
    mask = held[:, None, None] & is_channel[None, :, :]
    where = tier.data + place[:, None, None] + channel[None, :, :]
    return tl.load(where, mask=mask, other=0.0).to(tl.float32), mask
