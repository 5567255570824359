"""A long video becomes several items of vLLM's, each of a few frames.

vLLM computes an item at once and keeps it until its last token has run. So that it makes no more of
a video than a chunk asks for, and drops what is behind it, each group of frames is an item of its
own here: the encoder's budget, its cache and both model runners then work as they do for pictures.
What must see the video whole (positions, spans, reports) finds it in its first group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.v1.kv_cache_interface import iter_layer_specs

from vllm_budgetkv.arithmetic.frame_groups import GROUP_TOKENS, group_stops
from vllm_budgetkv.scheduler.spec import our_group
from vllm_budgetkv.start.frame_groups import (
    GRID,
    PIXELS,
    frames_of,
    items_refusal,
    stands_alone,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.request import Request

    from vllm_budgetkv.start.frame_groups import Frames


@dataclass
class FrameGroup(MultiModalFeatureSpec):
    """Some frames of a video.

    Args:
        whole: the video without its pixels, in its first group; None in the others.
    """

    whole: MultiModalFeatureSpec | None = None


@dataclass(frozen=True)
class EncoderRoom:
    """What the encoder makes in a step and keeps.

    Args:
        tokens: most embeddings, of all items together.
        in_groups: whether videos are computed in groups of frames.
        copies: whether pixels of a group are copied; else they are a view, and what sends them to
            workers must not send all that a view is of.
    """

    tokens: int
    in_groups: bool
    copies: bool = False

    @classmethod
    def of(cls, scheduler: AsyncScheduler) -> EncoderRoom:
        """Hold the scheduler's encoder to what groups need, if the workers say that they are
        right. Mutates `scheduler`."""
        config = scheduler.kv_cache_config
        tokens = bounded_tokens(config.kv_cache_groups[our_group(config)].kv_cache_spec)
        if tokens:
            scheduler.max_num_encoder_input_tokens = tokens
            manager = type(scheduler.encoder_cache_manager)
            scheduler.encoder_cache_manager = manager.create_manager(
                cache_size=tokens, vllm_config=scheduler.vllm_config
            )
        most = scheduler.max_num_encoder_input_tokens
        most = min(most, scheduler.encoder_cache_manager.cache_size)
        parallel = scheduler.vllm_config.parallel_config
        # vLLM's own queues send what a view shows
        copies = parallel.distributed_executor_backend not in (None, "uni", "mp")
        return cls(most, in_groups=bool(tokens), copies=copies)

    def cut(self, request: Request) -> None:
        """Put groups of frames in the place of the request's long videos. Mutates `request`.

        Raises:
            ValueError: an item can never be computed.
        """
        in_groups = self.in_groups and not request.resumable
        if refusal := items_refusal(request.mm_features, self.tokens, in_groups=in_groups):
            raise ValueError(refusal)
        if in_groups:
            request.mm_features = cut_videos(request.mm_features, copies=self.copies)

    def refusal_of_whole(self, request: Request) -> str | None:
        """Why an item of a session, whose videos are not cut, can never be computed."""
        return items_refusal(request.mm_features, self.tokens, in_groups=False)


def bounded_tokens(spec: KVCacheSpec) -> int:
    """Embeddings that the encoder takes, by the spec of our layers; 0 where videos are whole."""
    return max(getattr(of_layer, "encoder_tokens", 0) for of_layer in iter_layer_specs(spec))


def cut_videos(
    features: Sequence[MultiModalFeatureSpec],
    group_tokens: int = GROUP_TOKENS,
    *,
    copies: bool = False,
) -> list[MultiModalFeatureSpec]:
    """Features of a prompt, with groups of frames for each video of more than one group.

    Args:
        features: of the prompt, by offset.
        group_tokens: most embeddings of a group of several frames.
        copies: whether pixels are copied.
    """
    cut: list[MultiModalFeatureSpec] = []
    for index, feature in enumerate(features):
        frames = frames_of(feature)
        if frames is None or not stands_alone(features, index):
            cut.append(feature)
            continue
        stops = group_stops(frames.num_frames, frames.frame_tokens, group_tokens)
        groups = groups_of(feature, frames, stops, copies=copies)
        cut.extend([feature] if len(stops) == 1 else groups)
    return cut


def groups_of(
    feature: MultiModalFeatureSpec, frames: Frames, stops: Sequence[int], *, copies: bool
) -> Iterator[FrameGroup]:
    """A video as groups of frames; their places are that of the video, without gaps.

    Args:
        feature: the video.
        frames: of the video.
        stops: behind which frame each group ends.
        copies: whether pixels are copied.
    """
    data = feature.data
    assert data is not None
    rest = MultiModalKwargsItem({name: elem for name, elem in data.items() if name != PIXELS})
    whole: MultiModalFeatureSpec | None = replace(feature, data=rest)
    tokens = _first_tokens(feature.mm_position, frames, stops)
    start = 0
    for stop, first, last in zip(stops, tokens, tokens[1:], strict=False):
        part = slice_frames(data, frames, start, stop)
        if copies:
            part[PIXELS] = MultiModalFieldElem(part[PIXELS].data.clone(), part[PIXELS].field)
        yield FrameGroup(
            data=part,
            modality=feature.modality,
            # equal videos have equal groups
            identifier=f"{feature.identifier}/{start}-{stop}",
            mm_position=_part(feature.mm_position, first, last),
            mm_hash=feature.mm_hash,
            whole=whole,
        )
        start, whole = stop, None


def _first_tokens(place: PlaceholderRange, frames: Frames, stops: Sequence[int]) -> list[int]:
    """Where each group begins in a video's tokens, and the end of the last: text between two
    groups (timestamps) is at the end of the first."""
    embeds = [stop * frames.frame_tokens for stop in stops[:-1]]
    if place.is_embed is not None:
        positions = place.is_embed.nonzero().flatten()
        embeds = [int(positions[embed]) for embed in embeds]
    return [0, *embeds, place.length]


def _part(place: PlaceholderRange, first: int, last: int) -> PlaceholderRange:
    mask = None if place.is_embed is None else place.is_embed[first:last].clone()
    return PlaceholderRange(offset=place.offset + first, length=last - first, is_embed=mask)


def slice_frames(
    data: MultiModalKwargsItem, frames: Frames, start: int, stop: int
) -> MultiModalKwargsItem:
    """The fields of some frames of a video; pixels are a view.

    Args:
        data: fields of the video, which keep their kind.
        frames: of the video.
        start, stop: the first frame and the one behind the last.
    """
    return MultiModalKwargsItem(
        {
            name: MultiModalFieldElem(_sliced(name, elem.data, frames, start, stop), elem.field)
            for name, elem in data.items()
        }
    )


def _sliced(name: str, value: Any, frames: Frames, start: int, stop: int) -> Any:
    if name == PIXELS:
        return value[start * frames.frame_rows : stop * frames.frame_rows]
    if name == GRID:
        return torch.cat([value.new_full((1,), stop - start), value[1:]])
    if name == "timestamps" and hasattr(value, "__len__") and len(value) == frames.num_frames:
        return value[start:stop]
    return value
