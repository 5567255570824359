"""What heads recall from host memory: the references against naive ones, the kernels too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.ops.factories import batch_rows, is_same, strided_randn
from tests.ops.recall_factory import Remembered, make_remembered
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.ops import encode, mark, recall
from vllm_budgetkv.ops.reference.encode import encode as encode_reference
from vllm_budgetkv.ops.reference.index_pages import read_codes, read_digest, read_marks
from vllm_budgetkv.ops.reference.mark import mark as mark_reference
from vllm_budgetkv.ops.reference.recall import recall as recall_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_TOKENS = (700, 333)
LAYOUT = PageLayout(16, 32, torch.float32)


def energy_of(made: Remembered) -> torch.Tensor:
    """float32 [H, D], other for each head and channel."""
    shape = (made.cache.lens.shape[1], made.cache.pool.layout.head_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(9)) ** 4


def prepare(made: Remembered) -> None:
    """Write the index of all slots with the references."""
    for slot in range(len(made.num_tokens)):
        encode_reference(slot, made.tier, made.recalls, made.cache.pool, energy_of(made))
        mark_reference(slot, made.cache.heads, made.recalls)


def known_keys(made: Remembered, slot: int, head: int) -> torch.Tensor:
    """float64 [n, D]: what the index says of the keys of a head."""
    pool, count = made.cache.pool, int(made.recalls.num_tokens[slot, head])
    entry_tokens = int(made.recalls.entry_tokens[slot, head])
    pages = made.recalls.table[slot, head, : -(-count // made.index_tokens)].long()
    mean, step, channels = read_digest(pool.digests[pages], pool.layout.coded_channels)
    codes = read_codes(pool, pages, entry_tokens).double()
    known = mean.double()[:, None].repeat(1, codes.shape[1], 1)
    deviation = step.double()[:, None] * (codes - 7.5)
    known.scatter_add_(2, channels[:, None].expand_as(deviation), deviation)
    return known.flatten(0, 1).repeat_interleave(entry_tokens, dim=0)[:count]


def averaged(made: Remembered, keys: torch.Tensor) -> torch.Tensor:
    """float64 [e, D]: means of the keys [n, D] of each entry, in the digests' dtype."""
    groups, dtype = keys.float().split(made.entry_tokens), made.cache.pool.layout.dtype
    return torch.stack([group.mean(0) for group in groups]).to(dtype).double()


# --- encode -------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [encode_reference, encode], ids=["reference", "op"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_size", "entry_tokens"), [(32, 1), (40, 2), (128, 1), (64, 8)])
def test_a_code_is_the_nearest_level(
    op: Callable[..., None], head_size: int, entry_tokens: int, dtype: torch.dtype
) -> None:
    """Of the channels that move logits most; the others are at their mean."""
    check_codes(op, PageLayout(16, head_size, dtype), entry_tokens)


def check_codes(op: Callable[..., None], layout: PageLayout, entry_tokens: int) -> None:
    made = make_remembered((2500, 333), layout, entry_tokens=entry_tokens)
    energy = energy_of(made)
    for slot, count in enumerate(made.num_tokens):
        op(slot, made.tier, made.recalls, made.cache.pool, energy)
        keys, known = made.keys(slot, 0), known_keys(made, slot, 0)
        for number, first in enumerate(range(0, count, made.index_tokens)):
            part = slice(first, first + made.index_tokens)
            page = int(made.recalls.table[slot, 0, number])
            of_entries = averaged(made, keys[part]), known[part][::entry_tokens]
            check_page(made, page, *of_entries, energy[0].double())


def check_page(
    made: Remembered, page: int, keys: torch.Tensor, known: torch.Tensor, energy: torch.Tensor
) -> None:
    digests, num_channels = made.cache.pool.digests, made.cache.pool.layout.coded_channels
    mean, step, channels = (x.double() for x in read_digest(digests[page], num_channels))
    channels = channels.long()
    assert (channels.diff() > 0).all()
    weight = energy * keys.var(0, correction=0)
    others = weight.clone()
    others[channels] = 0
    assert weight[channels].min() >= others.max() * (1 - 1e-4)
    rounding = 2 * torch.finfo(digests.dtype).eps
    # means of entries are rounded to the cache's type, where Triton's interpreter rounds down
    blur = (made.entry_tokens > 1) * torch.finfo(digests.dtype).eps * float(keys.abs().max())
    torch.testing.assert_close(mean, keys.mean(0), rtol=rounding, atol=1e-5 + blur)
    deviation = 0.3352 * keys[:, channels].std(0, correction=0)
    torch.testing.assert_close(step, deviation, rtol=rounding, atol=1e-5 + blur)
    is_coded = torch.zeros_like(energy, dtype=torch.bool)
    is_coded[channels] = True
    assert torch.equal(known[:, ~is_coded], mean[~is_coded].expand(len(keys), -1))
    levels = mean[channels, None] + step[:, None] * (torch.arange(16) - 7.5)
    keys, known, largest = keys[:, channels], known[:, channels], keys.abs().max()
    nearest = (levels - keys[..., None]).abs().amin(-1)
    slack = 8 * torch.finfo(torch.float32).eps * (keys.abs() + mean[channels].abs() + 8 * step)
    if made.entry_tokens > 1:
        # a mean between two numbers of the cache's type may be rounded to either, which moves the
        # key and its nearest level; and it is a sum of terms that may cancel
        slack += 2 * torch.finfo(digests.dtype).eps * keys.abs()
        slack += 2 * made.entry_tokens * torch.finfo(torch.float32).eps * largest
    assert ((known - keys).abs() <= nearest + slack).all()


@pytest.mark.parametrize("op", [encode_reference, encode], ids=["reference", "op"])
def test_a_channel_without_deviation_is_its_mean(op: Callable[..., None]) -> None:
    """One token alone has none anywhere; of equals the lower channels are coded."""
    made = make_remembered([5, 1], LAYOUT)
    made.tier.tokens[:, :, 0, :, :3] = torch.where(
        made.tier.tokens[:, :, 0, :, :3].isnan(), torch.nan, 2.5
    )
    for slot in range(2):
        op(slot, made.tier, made.recalls, made.cache.pool, energy_of(made))
        known = known_keys(made, slot, 0)
        assert (known[:, :3] == 2.5).all()
        assert not known.isnan().any()
    pool, num_channels = made.cache.pool, LAYOUT.coded_channels
    _, _, channels = read_digest(pool.digests[int(made.recalls.table[1, 0, 0])], num_channels)
    assert channels.tolist() == list(range(num_channels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_pages(instruction_set: str, dtype: torch.dtype) -> None:
    """Codes are of keys as they are stored; digests have the type that the model computes in."""
    check_quantised(dtype)
    assert instruction_set


def check_quantised(dtype: torch.dtype, num_tokens: Sequence[int] = NUM_TOKENS) -> None:
    layout = PageLayout(16, 40, dtype, is_quantised=True)
    for encode_with, mark_with, recall_with in (
        (encode_reference, mark_reference, recall_reference),
        (encode, mark, recall),
    ):
        for entry_tokens in (1, 4):
            check_codes(encode_with, layout, entry_tokens)
            check_marks(mark_with, layout, entry_tokens)
            made = make_remembered(num_tokens, layout, num_heads=3, entry_tokens=entry_tokens)
            check_steps(recall_with, made, [1, 0], group=2)


def test_kernels_encode_as_the_reference(instruction_set: str) -> None:
    """Digests to the rounding of their type; codes differ where a key is between two levels."""
    for head_size, entry_tokens in ((40, 1), (64, 4)):
        layout = PageLayout(16, head_size, torch.bfloat16)
        made = make_remembered(NUM_TOKENS, layout, entry_tokens=entry_tokens)
        twin, energy = made.clone(), energy_of(made)
        for slot in range(2):
            encode_reference(slot, made.tier, made.recalls, made.cache.pool, energy)
            encode(slot, twin.tier, twin.recalls, twin.cache.pool, energy)
        known, other = known_keys(made, 0, 0), known_keys(twin, 0, 0)
        assert (known != other).float().mean() < 0.02
    assert instruction_set


# --- mark ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [mark_reference, mark], ids=["reference", "op"])
@pytest.mark.parametrize("entry_tokens", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_marks_are_the_positions_behind_the_recall_pages(
    op: Callable[..., None], dtype: torch.dtype, entry_tokens: int
) -> None:
    check_marks(op, PageLayout(16, 40, dtype), entry_tokens)


def check_marks(op: Callable[..., None], layout: PageLayout, entry_tokens: int) -> None:
    made = make_remembered((2500, 333), layout, num_heads=3, entry_tokens=entry_tokens)
    pool = made.cache.pool
    # decode appended a token that no index knows
    table, place = made.cache.table[0, 0], int(made.cache.lens[0, 0]) - 1
    pool.positions[int(table[place // 16]), place % 16] = 5000
    made.held[0][0] = made.held[0][0][:-1]
    for slot in range(2):
        op(slot, made.cache.heads, made.recalls)
        for head in range(2):
            pages = made.recalls.table[slot, head].long()
            pages = pages[pages < pool.num_pages]
            bits = read_marks(pool, pages, entry_tokens).flatten()
            found = set(bits.nonzero().flatten().tolist())
            assert found == set(made.held[slot][head].tolist())


# --- recall -------------------------------------------------------------------------------------


def run(
    op: Callable[..., None], made: Remembered, query: torch.Tensor, slots: Sequence[int]
) -> torch.Tensor:
    moved = torch.zeros_like(made.cache.lens)
    rows = batch_rows(slots, [1] * len(slots))
    op(query, made.cache.heads, rows, made.recalls, made.tier, 0.3, moved)
    return moved


def recalled(made: Remembered, slot: int, head: int) -> list[int]:
    """Positions in the recall pages of a head, in their places; K and V are checked bit by bit."""
    pool, count = made.cache.pool, int(made.recalls.num_recalled[slot, head])
    page_tokens = pool.layout.page_tokens
    pages = made.cache.table[slot, head, : count // page_tokens].long()
    positions = pool.positions[pages].flatten().tolist()
    for place, position in enumerate(positions):
        page, offset = pages[place // page_tokens], place % page_tokens
        key, value = made.token(slot, head, position)
        assert is_same(pool.keys[page, offset], key)
        assert is_same(pool.values[page, offset], value)
    return positions


def check_choice(made: Remembered, query: torch.Tensor, slot: int, head: int) -> None:
    """What stands in the recall pages has as much mass as the best tokens that are not held."""
    positions = recalled(made, slot, head)
    if not positions:
        return
    assert len(set(positions)) == len(positions)
    held = made.held[slot][head]
    assert not set(positions) & set(held.tolist())
    group = query.shape[0] // made.cache.lens.shape[1]
    queries = query[head * group : (head + 1) * group].double()
    logits = queries @ known_keys(made, slot, head).T * 0.3
    mass = logits.softmax(-1).sum(0)
    mass[held] = -1.0
    best = mass.topk(len(positions)).values
    found = mass[positions].sort(descending=True).values
    # a logit is a float32 sum of 2 D products, of terms that may cancel
    size = (queries.abs() @ known_keys(made, slot, head).abs().T).amax() * 0.3
    slack = 4 * query.shape[1] * torch.finfo(torch.float32).eps * float(size)
    assert (found >= best * (1 - slack) - 1e-12).all()


def pages_behind(made: Remembered, slots: Sequence[int]) -> torch.Tensor:
    """bool [P]: all pages but the recall pages of some slots."""
    others = torch.ones(made.cache.pool.num_pages, dtype=torch.bool)
    for slot in slots:
        for table, count in zip(
            made.cache.table[slot], made.recalls.num_recalled[slot], strict=True
        ):
            others[table[: int(count) // made.cache.pool.layout.page_tokens].long()] = False
    return others


def check_steps(
    op: Callable[..., None], made: Remembered, slots: Sequence[int], group: int
) -> None:
    """Of two steps: the second keeps what it still wants and moves the rest, and nothing else."""
    prepare(made)
    num_heads, head_size = made.cache.lens.shape[1], made.cache.pool.layout.head_size
    dtype, shape = made.cache.pool.layout.dtype, (len(slots), num_heads * group, head_size)
    before, others = made.cache.pool.raw.clone(), pages_behind(made, slots)
    old: dict[tuple[int, int], list[int]] = {}
    first, other = (strided_randn(shape, dtype, seed=seed) for seed in (3, 4))
    for query in (first, (first + 0.3 * other).to(dtype)):
        moved = run(op, made, query, slots)
        for row, slot in enumerate(slots):
            for head in range(num_heads):
                check_choice(made, query[row], slot, head)
                now = recalled(made, slot, head)
                was = old.get((slot, head), [-1] * len(now))
                stayed = [a == b for a, b in zip(was, now, strict=True)]
                # what is still wanted stays where it stood, and nothing else was spared a move
                assert set(was) & set(now) == {p for p, s in zip(was, stayed, strict=True) if s}
                assert int(moved[slot, head]) == len(now) - sum(stayed)
                fresh = [p for p, s in zip(now, stayed, strict=True) if not s]
                assert fresh == sorted(fresh)
                old[slot, head] = now
    assert torch.equal(made.cache.pool.raw[others], before[others])


@pytest.mark.parametrize("op", [recall_reference, recall], ids=["reference", "op"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_size", "entry_tokens"), [(32, 1), (40, 1), (128, 1), (64, 4)])
def test_the_best_tokens_come_back(
    op: Callable[..., None], head_size: int, entry_tokens: int, dtype: torch.dtype
) -> None:
    """The last head of each slot recalls nothing."""
    layout = PageLayout(16, head_size, dtype)
    made = make_remembered(NUM_TOKENS, layout, num_heads=3, entry_tokens=entry_tokens)
    check_steps(op, made, [1, 0], group=2)


def test_kernels_recall_as_the_reference(instruction_set: str) -> None:
    for layout in (PageLayout(8, 72, torch.bfloat16), PageLayout(64, 64, torch.float16)):
        made = make_remembered((500, 41, 900), layout, num_heads=4, recall_pages=1)
        made.recalls.num_recalled[1] = 0
        prepare(made)
        query = strided_randn((3, 8, layout.head_size), layout.dtype, seed=3)
        run(recall, made, query, [2, 1, 0])
        for row, slot in ((0, 2), (2, 0)):
            for head in range(3):
                check_choice(made, query[row], slot, head)
    assert instruction_set


@pytest.mark.parametrize("op", [recall_reference, recall], ids=["reference", "op"])
def test_equal_tokens_are_taken_from_the_end(op: Callable[..., None]) -> None:
    made = make_remembered([300], LAYOUT, held_share=0.0)
    prepare(made)
    run(op, made, torch.zeros(1, 2, 32), [0])
    assert recalled(made, 0, 0) == list(range(299 - 32, 299))


@pytest.mark.parametrize("op", [recall_reference, recall], ids=["reference", "op"])
def test_rows_without_a_token_change_nothing(op: Callable[..., None]) -> None:
    made = make_remembered(NUM_TOKENS, LAYOUT)
    prepare(made)
    before = made.cache.pool.raw.clone()
    moved = torch.zeros_like(made.cache.lens)
    rows = batch_rows([0, 0], [0, 0])
    op(torch.ones(2, 4, 32), made.cache.heads, rows, made.recalls, made.tier, 1.0, moved)
    assert torch.equal(made.cache.pool.raw, before)
    assert not moved.any()


def test_recall_refuses_what_would_read_outside() -> None:
    made = make_remembered(NUM_TOKENS, LAYOUT)
    prepare(made)
    query = torch.ones(1, 4, 32)
    with pytest.raises(IndexError, match="slot 2"):
        run(recall, made, query, [2])
    lost = made.clone()
    lost.tier.blocks[0, 3] = -1
    with pytest.raises(IndexError, match="host block"):
        run(recall, lost, query, [0])
    lost = made.clone()
    lost.recalls.table[0, 0, 0] = lost.cache.pool.num_pages
    with pytest.raises(IndexError, match="index"):
        run(recall, lost, query, [0])
    greedy = make_remembered([40], LAYOUT, held_share=0.9, recall_pages=2)
    prepare(greedy)
    with pytest.raises(ValueError, match="lacks"):
        run(recall, greedy, query, [0])
