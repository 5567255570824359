"""Where the text, the images and the video frames of a prompt are."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_budgetkv.cache.upload import upload

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class VisionItem(NamedTuple):
    """One image or video of the prompt, as the engine's placeholder range gives it.

    Attributes:
        offset: position of its first placeholder token in the prompt.
        length: placeholder tokens, 1 or more.
        modality: "image", "video" or another kind that is not text.
        frame_tokens: tokens of one frame, counted from `offset`; the last frame may be shorter.
            None: an image is one frame, and any other item has no frames.
    """

    offset: int
    length: int
    modality: str
    frame_tokens: int | None = None

    @property
    def stop(self) -> int:
        return self.offset + self.length


class TokenRange(NamedTuple):
    """Positions from `start` to before `stop`."""

    start: int
    stop: int


@dataclass(frozen=True)
class PromptSpans:
    """Text and vision spans of one prompt. They alternate: even ids are text, odd ids are vision.

    Span 0 is the text before the first item and is empty if there is none; the last span is text
    and takes the generated tokens too. Items with no text between them are one vision span, but
    each keeps its frames.

    Args:
        prompt_tokens: tokens of the prompt.
        items: multimodal items, in any order.
        closing_tokens: marks behind the last item that belong to it, as vLLM sees it, and are text.
        device: where `lookup` runs.

    Raises:
        ValueError: an item is empty, overlaps another, reaches beyond the prompt or has a frame
            that is not from 1 token to its length.
    """

    prompt_tokens: int
    items: Sequence[VisionItem]
    device: torch.device | str = "cpu"
    closing_tokens: int = 0

    def __post_init__(self) -> None:
        items = tuple(sorted(self.items, key=lambda item: item.offset))
        object.__setattr__(self, "items", items)
        stop = 0
        for item in items:
            if item.length < 1 or not stop <= item.offset <= self.prompt_tokens - item.length:
                raise ValueError(
                    f"{item.modality} of {item.length} tokens at {item.offset} does not fit: the "
                    f"prompt has {self.prompt_tokens} tokens and the item before it ends at {stop}"
                )
            if item.frame_tokens is not None and not 1 <= item.frame_tokens <= item.length:
                raise ValueError(
                    f"{item.modality} at {item.offset}: a frame of {item.frame_tokens} tokens must "
                    f"have from 1 token to the {item.length} tokens of the item"
                )
            stop = item.stop

    @cached_property
    def vision_ranges(self) -> tuple[TokenRange, ...]:
        """Vision spans, in order."""
        ranges: list[TokenRange] = []
        for item in self.items:
            start = item.offset
            if ranges and ranges[-1].stop == start:
                start = ranges.pop().start
            ranges.append(TokenRange(start, item.stop))
        return tuple(ranges)

    @property
    def end_of_vision(self) -> int:
        """Position behind the last item and the marks that close it; 0 without vision."""
        return self.vision_ranges[-1].stop + self.closing_tokens if self.vision_ranges else 0

    @cached_property
    def boundaries(self) -> torch.Tensor:
        """int32 [2 * vision spans] on `device`: first position of every span but the first."""
        edges = [edge for vision in self.vision_ranges for edge in vision]
        return upload(edges, torch.int32, self.device)

    def lookup(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the span of every token, on the device.

        Args:
            positions: int32 [...], logical indices; -1 counts as text of span 0.

        Returns:
            span_ids int32 [...] and is_vision bool [...]. Nothing is mutated.
        """
        span_ids = torch.searchsorted(self.boundaries, positions, right=True, out_int32=True)
        return span_ids, (span_ids & 1).bool()

    @cached_property
    def num_patches(self) -> int:
        """Patch ids of `lookup_frames` are below it, and it is at least 1."""
        return max(1, sum({_frame_tokens(item) for item in self.items}))

    @cached_property
    def _frame_table(self) -> torch.Tensor:
        """int32 [4, items] on `device`: offset, tokens per frame, first frame and first patch id.

        Items with equally large frames share their patch ids; others have none in common.
        """
        sizes = [_frame_tokens(item) for item in self.items]
        first_patch: dict[int, int] = {}
        num_patches = 0
        for size in sizes:
            if size not in first_patch:
                first_patch[size] = num_patches
                num_patches += size
        counts = [-(-item.length // size) for item, size in zip(self.items, sizes, strict=True)]
        rows = [
            [item.offset for item in self.items],
            sizes,
            list(accumulate(counts, initial=0))[:-1],
            [first_patch[size] for size in sizes],
        ]
        return upload(rows, torch.int32, self.device)

    def lookup_frames(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the frame of every vision token and its place there, on the device.

        Args:
            positions: int32 [...], logical indices; -1 counts as text.

        Returns:
            frame_ids int32 [...], counted over the prompt, -1 for text; and patch_ids int32 [...],
            equal for the same place of frames of equally many tokens, 0 for text. Nothing is
            mutated.
        """
        is_vision = self.lookup(positions)[1]
        if not self.items:
            return torch.full_like(positions, -1), torch.zeros_like(positions)
        offsets, sizes, first_frames, first_patches = self._frame_table
        items = (torch.searchsorted(offsets, positions, right=True) - 1).clamp(min=0)
        inside, size = positions - offsets[items], sizes[items]
        frame_ids = first_frames[items] + torch.div(inside, size, rounding_mode="floor")
        patch_ids = first_patches[items] + inside % size
        return frame_ids.masked_fill(~is_vision, -1), patch_ids.masked_fill(~is_vision, 0)

    def span_tokens(self, seen_tokens: int) -> torch.Tensor:
        """Tokens of every span among the first `seen_tokens`: int32 [2 * vision spans + 1]."""
        edges = self.boundaries.clamp(max=seen_tokens)
        starts = torch.nn.functional.pad(edges, (1, 0), value=0)
        stops = torch.nn.functional.pad(edges, (0, 1), value=seen_tokens)
        return stops - starts

    def count_text(self, seen_tokens: int) -> int:
        """Text tokens among the first `seen_tokens`, generated ones included."""
        vision = sum(
            max(0, min(span.stop, seen_tokens) - span.start) for span in self.vision_ranges
        )
        return seen_tokens - vision

    def last_text_positions(self, start: int, stop: int, count: int) -> list[int]:
        """The last text positions in [start, stop), at most `count`, ascending.

        They name the queries that join the probe. Positions behind the prompt are generated text.
        """
        positions: list[int] = []
        text_stop = stop
        for vision in (*reversed(self.vision_ranges), TokenRange(0, 0)):
            text_start = max(start, vision.stop, text_stop - (count - len(positions)))
            positions = [*range(text_start, text_stop), *positions]
            text_stop = min(text_stop, vision.start)
            if len(positions) >= count or text_stop <= start:
                break
        return positions

    def trailing_frame_start(self, seen_tokens: int) -> int:
        """First position of the frame that is cut after `seen_tokens`; `seen_tokens` if none is."""
        index = bisect_right(self.items, seen_tokens, key=lambda item: item.offset) - 1
        if index < 0 or seen_tokens >= self.items[index].stop:
            return seen_tokens
        item = self.items[index]
        return seen_tokens - (seen_tokens - item.offset) % _frame_tokens(item)


def fit_items(prompt_tokens: int, items: Iterable[VisionItem]) -> list[VisionItem]:
    """What `PromptSpans` takes of any items: the first to stand at a place has it.

    Args:
        prompt_tokens: tokens of the prompt; what reaches beyond them is cut off.
        items: in order of their offsets.
    """
    fitting = []
    free = 0
    for item in items:
        start, stop = max(item.offset, free), min(item.stop, prompt_tokens)
        if start >= stop:
            continue
        frame_tokens = item.frame_tokens
        if start > item.offset or (frame_tokens is not None and frame_tokens < 1):
            # its first frame is cut, and the others cannot be counted from there
            frame_tokens = None
        if frame_tokens is not None:
            frame_tokens = min(frame_tokens, stop - start)
        fitting.append(item._replace(offset=start, length=stop - start, frame_tokens=frame_tokens))
        free = stop
    return fitting


def _frame_tokens(item: VisionItem) -> int:
    """Tokens of a whole frame of `item`; 1 where it has no frames."""
    if item.frame_tokens is not None:
        return item.frame_tokens
    return item.length if item.modality == "image" else 1
