"""Whether a video can be computed in groups of frames, by the engine's options and by its fields.

The worker proves that the model's tower sees each frame alone (`worker/frame_proof.py`); what is
asked here is known in a front end, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.arithmetic.frame_groups import bounded_encoder_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_budgetkv.start.engine_config import EngineConfig

VIDEO = "video"
PIXELS = "pixel_values_videos"
GRID = "video_grid_thw"


@dataclass(frozen=True)
class Frames:
    """Frames of a video that are all equal; with temporal patches, one is several of the file.

    Args:
        num_frames: of the video.
        frame_tokens: embeddings of a frame.
        frame_rows: rows of pixels of a frame.
    """

    num_frames: int
    frame_tokens: int
    frame_rows: int


def reasons_against(engine: EngineConfig) -> list[str]:
    """Options with which each video is computed as a whole; empty if it need not be."""
    model = engine.model_config
    media = model.multimodal_config
    return [] if media is None else [*_reasons(engine, media)]


def _reasons(engine: EngineConfig, media: Any) -> Iterator[str]:
    model = engine.model_config
    if media.is_multimodal_pruning_enabled():
        yield "--video-pruning-rate compares the frames of a video"
    if media.mm_processor_cache_type == "shm":
        yield "--mm-processor-cache-type shm gives pixels to the workers alone"
    if media.enable_mm_embeds or model.enable_prompt_embeds:
        yield "--enable-mm-embeds and --enable-prompt-embeds let clients send embeddings"
    if engine.scheduler_config.disable_chunked_mm_input:
        yield "--disable-chunked-mm-input keeps a video in one chunk"


def frames_of(feature: Any) -> Frames | None:
    """The frames of an item; None for one that is no video with equal frames, or not to be read.

    Args:
        feature: vLLM's `MultiModalFeatureSpec`.
    """
    data, num_embeds = feature.data, feature.mm_position.get_num_embeds()
    if feature.modality != VIDEO or data is None or GRID not in data or PIXELS not in data:
        return None
    grid, pixels = data[GRID].data, data[PIXELS].data
    if getattr(grid, "ndim", None) != 1 or len(grid) != 3:
        return None
    num_frames, height, width = (int(number) for number in grid)
    if min(num_frames, height, width) < 1 or num_embeds < 1 or num_embeds % num_frames:
        return None
    frame_rows = height * width
    if not hasattr(pixels, "shape") or pixels.shape[0] != num_frames * frame_rows:
        return None
    return Frames(num_frames, num_embeds // num_frames, frame_rows)


def least_encoder_tokens(engine: EngineConfig) -> int:
    """Embeddings that the encoder takes at least, where videos are computed in groups."""
    return bounded_encoder_tokens(engine.scheduler_config.max_num_batched_tokens, 0)


def item_refusal(feature: Any, most_tokens: int, *, in_groups: bool) -> str | None:
    """Why the encoder cannot take an item; None if it can.

    Args:
        feature: vLLM's `MultiModalFeatureSpec`.
        most_tokens: embeddings that the encoder makes in a step and keeps.
        in_groups: whether videos whose frames can be told apart are computed in groups.
    """
    num_embeds = feature.mm_position.get_num_embeds()
    if num_embeds <= most_tokens:
        return None
    frames = frames_of(feature) if in_groups else None
    if frames is None:
        return (
            f"one {feature.modality} of {num_embeds} tokens is computed as a whole, but the "
            f"encoder takes {most_tokens} at once: send fewer or smaller frames, or raise "
            "--max-num-batched-tokens"
        )
    if frames.frame_tokens > most_tokens:
        return (
            f"a video has frames of {frames.frame_tokens} tokens, but the encoder takes "
            f"{most_tokens} at once: send smaller frames or raise --max-num-batched-tokens"
        )
    return None


def small_video(processor: Any, seq_len: int) -> Any:
    """A video of a few frames, as the model's processor makes it.

    Args:
        processor: of the model, as `MultiModalBudget` has it.
        seq_len: `--max-model-len`.

    Returns:
        A `MultiModalFeatureSpec`.
    """
    from vllm.config.multimodal import VideoDummyOptions
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.multimodal.processing.context import TimingContext

    options = {VIDEO: VideoDummyOptions(num_frames=4, width=64, height=64)}
    inputs = processor.get_dummy_inputs(seq_len=seq_len, mm_counts={VIDEO: 1}, mm_options=options)
    made = processor.apply(inputs, timing_ctx=TimingContext(enabled=False))
    return MultiModalFeatureSpec(
        data=made["mm_kwargs"][VIDEO][0],
        modality=VIDEO,
        identifier="",
        mm_position=made["mm_placeholders"][VIDEO][0],
    )
