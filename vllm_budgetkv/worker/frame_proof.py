"""Whether a vision tower sees each frame alone: asked of the model's own code, at start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.multimodal.inputs import MultiModalFieldElem, MultiModalKwargsItem
from vllm.multimodal.utils import group_and_batch_mm_kwargs

from vllm_budgetkv.scheduler.frame_groups import slice_frames
from vllm_budgetkv.start.frame_groups import GRID, PIXELS, VIDEO, Frames

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_FRAMES = 4
# kernels are chosen by the number of rows, and add in another order: relative to the outputs
ROUNDING_STEPS = 16
LEAST_ERROR = 1e-3


def with_frames(
    video: MultiModalKwargsItem, made: Frames, pixels: torch.Tensor
) -> MultiModalKwargsItem:
    """The fields of a video with as many frames as `pixels` have.

    Args:
        video: fields that the model's processor made.
        made: its frames.
        pixels: rows of pixels of whole frames, [frames * rows, ...].
    """
    num_frames = len(pixels) // made.frame_rows
    fields = {}
    for name, elem in video.items():
        value = elem.data
        if name == PIXELS:
            value = pixels
        elif name == GRID:
            value = torch.cat([value.new_full((1,), num_frames), value[1:]])
        elif name == "timestamps" and len(value) == made.num_frames:
            value = [float(i) for i in range(num_frames)]
        fields[name] = MultiModalFieldElem(value, elem.field)
    return MultiModalKwargsItem(fields)


class FrameProof:
    """Runs a model's tower on noise.

    Args:
        model: with its weights.
        video: fields of a small video that the model's processor made.
        frames: of that video.
        device: of the model.
    """

    def __init__(
        self, model: Any, video: MultiModalKwargsItem, frames: Frames, device: torch.device
    ) -> None:
        self._model = model
        self._video = video
        self._made = frames
        self._device = device
        self.frames = Frames(NUM_FRAMES, frames.frame_tokens, frames.frame_rows)

    @torch.inference_mode()
    def problem(self) -> str | None:
        """Why videos must be computed as a whole; None if groups of frames give the same."""
        noise = [self._noise(seed) for seed in range(2)]
        half = NUM_FRAMES // 2 * self.frames.frame_rows
        others = (
            torch.cat([noise[0][:half], noise[1][half:]]),
            torch.cat([noise[1][:half], noise[0][half:]]),
        )
        item = self._item(noise[0])
        (whole,) = self._run([item])
        most = NUM_FRAMES * self.frames.frame_tokens
        if len(whole) != most or not whole.isfinite().all():
            return f"{len(whole)} embeddings of {NUM_FRAMES} frames, which must be {most} numbers"
        middle = NUM_FRAMES // 2 * self.frames.frame_tokens
        for pixels, same, changed in (
            (others[0], slice(0, middle), slice(middle, None)),
            (others[1], slice(middle, None), slice(0, middle)),
        ):
            (found,) = self._run([self._item(pixels)])
            # runs of equal shapes: what does not follow from a frame is equal to the bit
            if not torch.equal(found[same], whole[same]):
                return "a frame's embeddings follow from other frames"
            if torch.equal(found[changed], whole[changed]):
                return "a frame's embeddings do not follow from its pixels"
        groups = [slice_frames(item, self.frames, *cut) for cut in ((0, 1), (1, NUM_FRAMES))]
        return self._difference(whole, torch.cat(self._run(groups)))

    def _difference(self, whole: torch.Tensor, groups: torch.Tensor) -> str | None:
        if groups.shape != whole.shape:
            return f"groups of frames have {len(groups)} embeddings, the video {len(whole)}"
        error = (groups.double() - whole.double()).norm() / whole.double().norm()
        most = max(ROUNDING_STEPS * torch.finfo(whole.dtype).eps, LEAST_ERROR)
        if error <= most:
            return None
        return f"groups of frames differ by {error:.2g} of the embeddings, rounding by {most:.2g}"

    def _noise(self, seed: int) -> torch.Tensor:
        """[rows, ...] on the host: all ranks of a tower have the same."""
        made = self._video[PIXELS].data
        shape = (NUM_FRAMES * self.frames.frame_rows, *made.shape[1:])
        source = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=source).to(made.dtype)

    def _item(self, pixels: torch.Tensor) -> MultiModalKwargsItem:
        return with_frames(self._video, self._made, pixels)

    def _run(self, items: Sequence[MultiModalKwargsItem]) -> list[torch.Tensor]:
        """Embeddings of each item, [tokens, hidden], of one batch as the runners form it."""
        outputs: list[torch.Tensor] = []
        for _, _, batch in group_and_batch_mm_kwargs(
            [(VIDEO, item) for item in items], device=self._device
        ):
            outputs.extend(self._model.embed_multimodal(**batch))
        return outputs
