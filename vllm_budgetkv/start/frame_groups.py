"""Whether a video can be computed in groups of frames, by the engine's options and by its fields.

The worker proves that the model's tower sees each frame alone (`worker/frame_proof.py`); what is
asked here is known in a front end, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.start import stages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm.config import VllmConfig

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
    if stages.is_staged(engine):
        yield f"{stages.FLAG} has stages without the tower, which prove nothing"
    if media.is_multimodal_pruning_enabled():
        yield "--video-pruning-rate compares the frames of a video"
    if media.mm_processor_cache_type == "shm":
        yield "--mm-processor-cache-type shm gives pixels to the workers alone"
    if media.enable_mm_embeds or model.enable_prompt_embeds:
        yield "--enable-mm-embeds and --enable-prompt-embeds let clients send embeddings"
    if engine.scheduler_config.disable_chunked_mm_input:
        yield "--disable-chunked-mm-input keeps a video in one chunk"


def reasons_to_keep_whole(vllm_config: VllmConfig) -> list[str]:
    """The same of an engine that starts: what else has a say in its towers and their outputs."""
    return [*reasons_against(vllm_config), *_beside(vllm_config)]


def _beside(vllm_config: VllmConfig) -> Iterator[str]:
    lora = vllm_config.lora_config
    if lora is not None and lora.enable_tower_connector_lora:
        yield "--enable-tower-connector-lora adapts the tower"
    if vllm_config.ec_transfer_config is not None:
        yield "--ec-transfer-config shares its embeddings"


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


def stands_alone(features: Sequence[Any], index: int) -> bool:
    """Whether no other item, the sound of a video, stands among the tokens of this one.

    Args:
        features: vLLM's `MultiModalFeatureSpec` of each item of a prompt, by offset.
        index: of the item.
    """
    place = features[index].mm_position
    around = [*features[max(0, index - 1) : index], *features[index + 1 : index + 2]]
    return not any(
        other.mm_position.offset < place.offset + place.length
        and place.offset < other.mm_position.offset + other.mm_position.length
        for other in around
    )


def items_refusal(
    features: Sequence[Any], most_tokens: int, *, in_groups: bool, lacks_data: bool = False
) -> str | None:
    """Why the encoder cannot take an item of a prompt; None if it can take all.

    Args:
        features: vLLM's `MultiModalFeatureSpec` of each, by offset.
        most_tokens: embeddings that the encoder makes in a step and keeps.
        in_groups: whether videos whose frames can be told apart are computed in groups.
        lacks_data: whether an earlier request may have brought data that are not here: then only
            who has them can say how the frames of such a video are.
    """
    for index, feature in enumerate(features):
        is_cut = in_groups and stands_alone(features, index)
        if lacks_data and is_cut and feature.modality == VIDEO and feature.data is None:
            continue
        if reason := _item_refusal(feature, most_tokens, in_groups=is_cut):
            return reason
    return None


def _item_refusal(feature: Any, most_tokens: int, *, in_groups: bool) -> str | None:
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
