"""vLLM's memory trial, bounded to what the encoder takes where videos are in groups of frames."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_budgetkv.worker.video_encoder import VideoEncoder, part_outputs


class Counts(SimpleNamespace):
    """What the trial asks of a `MultiModalBudget`."""

    def get_dummy_encoder_profile_inputs(self, modality: str, most: int) -> list[Any]:
        return [(modality, None)] * most


@pytest.mark.parametrize(
    ("tokens", "largest", "most_items", "kinds", "items"),
    [
        # the largest picture fills the encoder
        (16384, {"image": 16384, "video": 114688}, {"image": 7, "video": 1}, {"image": 16384}, 1),
        # several do
        (4096, {"audio": 10, "image": 1024, "video": 9}, {"image": 9}, {"image": 1024}, 4),
        # one request with one small picture does not
        (4096, {"image": 1024, "video": 16384}, {"image": 1}, {"video": 252}, 16),
        (2560, {"video": 16384}, {"video": 1}, {"video": 252}, 10),
    ],
)
def test_the_trial_is_bounded(
    tokens: int,
    largest: dict[str, int],
    most_items: dict[str, int],
    kinds: dict[str, int],
    items: int,
) -> None:
    counts: Any = Counts(mm_max_toks_per_item=largest, mm_max_items_per_batch=most_items)
    group: Any = object()
    encoder = VideoEncoder(tokens, counts, group, 252)
    with encoder.tried(is_v2=False):
        ((kind, _),) = counts.mm_max_toks_per_item.items()
    assert counts.mm_max_toks_per_item == kinds
    assert counts.mm_max_items_per_batch == {kind: items}
    assert counts.encoder_cache_size == counts.encoder_compute_budget == tokens
    tried = counts.get_dummy_encoder_profile_inputs(kind, items)
    assert tried == [(kind, group if kind == "video" else None)] * items


class Tower:
    """Splits what it made of a batch, as those of vLLM do."""

    def embed_multimodal(self, *, rows: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
        return rows.split(sizes)


@pytest.mark.parametrize("sizes", [[8], [3, 5]])
def test_no_item_keeps_its_batch_alive(sizes: list[int]) -> None:
    """The bug: the encoder kept more than its room, a batch for one group of it."""
    tower, rows = Tower(), torch.randn(8, 4)
    part_outputs(tower)
    found = tower.embed_multimodal(rows=rows, sizes=sizes)
    assert torch.equal(torch.cat(tuple(found)), rows)
    kept = [part.untyped_storage().nbytes() for part in found]
    assert kept == [part.numel() * part.element_size() for part in found]
