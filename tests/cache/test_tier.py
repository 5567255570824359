"""Blocks of host memory on their own: what is made ready for a request."""

from __future__ import annotations

import pytest
import torch

from vllm_budgetkv.arithmetic.host_blocks import HostPlace
from vllm_budgetkv.arithmetic.layout import PageLayout
from vllm_budgetkv.cache.tier import HostTier

LAYOUT = PageLayout(8, 32, torch.float32)
TAIL_TOKENS = 3


def make_tier(*, poison: bool) -> HostTier:
    """Two slots, three layers of two heads, six blocks."""
    lens = torch.zeros(2, 3, 2, dtype=torch.int32)
    return HostTier.empty(LAYOUT, lens, num_blocks=6, longest_tokens=40, poison=poison)


@pytest.mark.parametrize("poison", [False, True])
def test_a_block_begins_with_a_copy_of_what_another_keeps(*, poison: bool) -> None:
    """Its tokens and their rotary positions; what lies behind is the request's own to write."""
    tier = make_tier(poison=poison)
    tier.enter(0, HostPlace(blocks=(4, 1)))
    generator = torch.Generator().manual_seed(1)
    tier.tokens[1] = torch.randn(tier.tokens[1].shape, generator=generator)
    positions = torch.arange(100, 100 + 16)
    tier.note_positions(0, 0, positions)
    tier.prepare([HostPlace(blocks=(4, 5), num_shared=1, num_tokens=8 + TAIL_TOKENS, tail_block=1)])
    assert torch.equal(tier.tokens[5, ..., :TAIL_TOKENS, :], tier.tokens[1, ..., :TAIL_TOKENS, :])
    assert tier.places[5, :TAIL_TOKENS].tolist() == positions[8 : 8 + TAIL_TOKENS].tolist()
    if poison:
        assert tier.tokens[5, ..., TAIL_TOKENS:, :].isnan().all()
    tier.enter(1, HostPlace(blocks=(4, 5)))
    assert int(tier.largest_position(1, 0, 8 + TAIL_TOKENS)) == 100 + 8 + TAIL_TOKENS - 1


def test_the_largest_position_is_that_of_the_tokens_asked_for() -> None:
    """Positions of pictures do not grow from token to token."""
    tier = make_tier(poison=False)
    tier.enter(1, HostPlace(blocks=(2, 0)))
    tier.note_positions(1, 2, torch.tensor([7, 9, 9, 8, 11, 3, 4]))
    assert int(tier.largest_position(1, 2, 6)) == 9
    assert int(tier.largest_position(1, 6, 9)) == 11
    tier.release(1)
    assert (tier.blocks[1] == -1).all()
