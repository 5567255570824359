"""Which towers may compute a video in groups of frames: the worker asks the tower."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem

from vllm_budgetkv.start.frame_groups import GRID, PIXELS, Frames
from vllm_budgetkv.worker.frame_proof import FrameProof, with_frames

if TYPE_CHECKING:
    from collections.abc import Callable

HEIGHT, WIDTH, CHANNELS, MERGED = 4, 8, 6, 4
MADE = Frames(num_frames=2, frame_tokens=HEIGHT * WIDTH // MERGED, frame_rows=HEIGHT * WIDTH)
PROJECTION = torch.randn(CHANNELS * MERGED, 16, generator=torch.Generator().manual_seed(3))


def small_video() -> MultiModalKwargsItem:
    """What a processor makes: all frames alike."""
    grid = torch.tensor([[MADE.num_frames, HEIGHT, WIDTH]])
    values: dict[str, Any] = {
        PIXELS: torch.zeros(MADE.num_frames * MADE.frame_rows, CHANNELS),
        GRID: grid,
        "timestamps": [[0.5, 1.5]],
    }
    fields = {
        PIXELS: MultiModalFieldConfig.flat_from_sizes("video", grid.prod(-1)),
        GRID: MultiModalFieldConfig.batched("video", keep_on_cpu=True),
        "timestamps": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
    }
    return MultiModalKwargsItem(
        {name: field.build_elems(name, values[name])[0] for name, field in fields.items()}
    )


class Tower:
    """A model whose embeddings of a video, [frames, tokens, 16], `change` makes otherwise."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.change = change

    def embed_multimodal(self, **fields: Any) -> list[torch.Tensor]:
        """Embeddings of each video of a batch."""
        sizes = fields[GRID].prod(-1).tolist()
        assert [len(times) for times in fields["timestamps"]] == fields[GRID][:, 0].tolist()
        found = []
        for pixels, grid in zip(fields[PIXELS].split(sizes), fields[GRID], strict=True):
            patches = pixels.view(int(grid[0]), -1, CHANNELS * MERGED)
            found.append(self.change((patches @ PROJECTION).tanh()).flatten(0, 1))
        return found


def attend(rows: torch.Tensor) -> torch.Tensor:
    return torch.softmax(rows @ rows.mT, -1) @ rows


def over_all(rows: torch.Tensor) -> torch.Tensor:
    return attend(rows.flatten(0, 1)).view_as(rows)


def timed(rows: torch.Tensor) -> torch.Tensor:
    return rows + 0.1 * torch.arange(len(rows))[:, None, None]


def causal(rows: torch.Tensor) -> torch.Tensor:
    return rows + 1e-4 * rows.cumsum(0)


def with_newline(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, rows[:1]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (attend, None),
        (over_all, "follow from other frames"),
        (causal, "follow from other frames"),
        (timed, "groups of frames differ by"),
        (with_newline, "embeddings of 4 frames"),
        (torch.zeros_like, "do not follow from its pixels"),
        (lambda rows: rows * float("nan"), "embeddings of 4 frames"),
    ],
    ids=["frame alone", "all frames", "earlier frames", "time", "newline", "constant", "nan"],
)
def test_only_a_tower_that_sees_each_frame_alone_passes(
    change: Callable[[torch.Tensor], torch.Tensor], words: str | None
) -> None:
    proof = FrameProof(Tower(change), small_video(), MADE, torch.device("cpu"))
    found = proof.problem()
    assert found is None if words is None else words in (found or "")


def test_a_video_with_other_frames_has_the_same_fields() -> None:
    pixels = torch.ones(3 * MADE.frame_rows, CHANNELS)
    item = with_frames(small_video(), MADE, pixels)
    assert item[GRID].data.tolist() == [3, HEIGHT, WIDTH]
    assert item[PIXELS].data is pixels
    assert len(item["timestamps"].data) == 3
