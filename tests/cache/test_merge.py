"""Merging inside the worker: what is cached is what the formulas say, chunk after chunk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import torch

from tests.cache.client import Client
from tests.cache.lab import Lab
from tests.cache.test_scenarios import QUOTA, assert_empty, long_run, make_lab, play
from tests.ops.naive_merge import HeadTokens, naive_merge
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.cache.compressor import Compressor
from vllm_budgetkv.ops.merge import VALUE_THRESHOLD
from vllm_budgetkv.policy import PolicyOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_budgetkv.cache.cache import BudgetCache
    from vllm_budgetkv.cache.requests import RequestState

MODES = {
    "lookm-average": "average",
    "lookm-pivot": "pivot",
    "lookm-weighted": "weighted",
    "hybrid": "value",
}
OPTIONS = PolicyOptions(sink_tokens=2, window_tokens=8, probe_tokens=4)


class MergingLab(Lab):
    """A lab whose shadow merges too, in float64 and by a loop, at every compression.

    Keys lie around a few directions, so that there is something to merge.
    """

    def make_cache(self, policy: str, num_slots: int) -> BudgetCache:
        self.num_changed = 0
        if policy == "hybrid":
            self.options = replace(self.options, merge="value")
        self.mode = MODES[policy]
        cache = super().make_cache(policy, num_slots)
        watched = WatchedCompressor(**vars(cache.layers.compressor), lab=self)
        cache.layers = replace(cache.layers, compressor=watched)
        return cache

    def project(
        self, client: Client, layer: int, first: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = super().project(client, layer, first, count)
        direction = torch.arange(first, first + count) % 3
        key = 0.3 * key + 4.0 * torch.eye(self.head_size)[direction][:, None]
        return query, key, value

    def merge_shadow(self, name: tuple[str, int], before: list[torch.Tensor]) -> None:
        """Merge what every head held at positions `before` into what it still holds."""
        request = self.cache.slots.requests[name[0]]
        client, shadow = Client(name[0], 0), self.shadow[name]
        heads = []
        for head, positions in enumerate(before):
            keep = torch.isin(positions, self.held(client, name[1], head))
            _, is_vision = request.spans.lookup(positions[None].int())
            keys, values = shadow[positions, :, head].unbind(1)
            heads.append(HeadTokens(keys, values, positions, keep, is_vision[0]))
        merged = naive_merge(heads, self.mode, VALUE_THRESHOLD)
        for head, (tokens, pair) in enumerate(zip(heads, merged, strict=True)):
            fresh = torch.stack(pair, dim=1).float()
            self.num_changed += int((fresh != shadow[tokens.positions, :, head]).any(dim=2).sum())
            shadow[tokens.positions, :, head] = fresh

    def check_content(self, client: Client, layer: int) -> None:
        """Every held token is what the shadow has made of it; the lab wants equal bits."""
        slot, page_tokens = (
            self.cache.slots.requests[client.request_id].slot,
            self.quota.page_tokens,
        )
        for head in range(self.heads):
            positions = self.held(client, layer, head)
            assert (positions.diff() > 0).all()
            pages = self.cache.tables.page_table[slot, layer, head]
            pages = pages[: -(-len(positions) // page_tokens)].long()
            shadow = self.shadow[client.request_id, layer][positions, :, head]
            for index, field in enumerate((self.pool.keys, self.pool.values)):
                held = field[pages].flatten(0, 1)[: len(positions)]
                torch.testing.assert_close(held, shadow[:, index], rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class WatchedCompressor(Compressor):
    """Tells the lab what every head held before a compression."""

    lab: MergingLab

    def compress(
        self, request: RequestState, layers: Sequence[int], num_tokens: int, last: bool
    ) -> None:
        client, heads = Client(request.request_id, 0), range(self.lab.heads)
        before = [[self.lab.held(client, layer, head) for head in heads] for layer in layers]
        super().compress(request, layers, num_tokens, last)
        for layer, held in zip(layers, before, strict=True):
            self.lab.merge_shadow((request.request_id, layer), held)


@pytest.mark.parametrize("policy", MODES)
def test_random_scenarios(policy: str) -> None:
    num_changed = 0
    for seed in range(12):
        lab = make_lab(seed, policy, MergingLab)
        play(lab, num_steps=30)
        assert_empty(lab)
        num_changed += lab.num_changed
    assert num_changed > 100


@pytest.mark.parametrize("policy", MODES)
def test_long_prompt_and_output(policy: str) -> None:
    lab = MergingLab(policy, Quota(**QUOTA), pool_blocks=12, options=OPTIONS)
    client = long_run(lab, 24)
    assert lab.num_changed > 100
    average = lab.cache.tables.lens[lab.cache.slots.requests["long"].slot].float().mean().item()
    assert average <= lab.quota.budget_tokens + lab.quota.decode_interval_tokens
    for layer in range(lab.layers):
        assert lab.held(client, layer, 0)[-1] == client.computed_tokens - 1
