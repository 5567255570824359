"""Pictures whose tokens attend both ways: attention and the ledger, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.cache import test_scenarios
from tests.cache.client import Client, Feature
from tests.cache.lab import Lab
from tests.cache.scripted import BLOCKS, small_quota
from vllm_budgetkv.arithmetic.pictures import whole_tokens

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.pictures import Range
    from vllm_budgetkv.cache.step import Step


class PictureLab(Lab):
    """Every frame that a chunk holds is a picture, and no chunk ends inside of one."""

    num_seen = 0

    def step(self, work: dict[Client, int], **others: Any) -> Step | None:
        whole = {}
        for client, count in work.items():
            client.pictures = self._pictures_of(client)
            whole[client] = whole_tokens(client.computed_tokens, count, client.pictures)
        return super().step({client: count for client, count in whole.items() if count}, **others)

    def _pictures_of(self, client: Client) -> list[Range]:
        return [
            (first, first + feature.frame_tokens)
            for feature in client.features
            if feature.frame_tokens <= self.quota.chunk_tokens
            for first in range(
                feature.offset, feature.offset + feature.length, feature.frame_tokens
            )
        ]

    def forward(self, work: dict[Client, int]) -> Step:
        step = super().forward(work)
        self.num_seen += step.ahead is not None
        return step


@pytest.mark.parametrize("policy", ["hybrid", "window", "snapkv", "keydiff"])
def test_random_scenarios(policy: str) -> None:
    num_seen = 0
    for seed in range(12):
        lab = test_scenarios.make_lab(seed, policy, PictureLab)
        test_scenarios.play(lab, num_steps=30)
        test_scenarios.assert_empty(lab)
        num_seen += lab.num_seen
    assert num_seen > 20


def test_a_chunk_that_cuts_a_picture_is_refused() -> None:
    """The scheduler lets none through; an answer that is another would be worse."""
    lab = Lab("window", small_quota(), pool_blocks=BLOCKS)
    client = Client("long", 300, pictures=[(5, 13)])
    with pytest.raises(RuntimeError, match="cut a picture .*tokens 0 to 9 end inside of the pic"):
        lab.step({client: 9})


def test_a_batch_without_tokens_of_pictures_has_nothing_ahead() -> None:
    lab = PictureLab("window", small_quota(), pool_blocks=BLOCKS)
    client = Client("long", 300, [Feature(5, 8, 8)])
    found = [lab.step({client: count}) for count in (5, 8, 10)]
    assert [step.ahead is None for step in found if step] == [True, False, True]
    assert found[1] and found[1].ahead is not None
    assert found[1].ahead.tolist() == [*range(7, -1, -1)]
