"""Processors of families that see: those of Transformers, for pictures of few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

PATCH_PIXELS, MERGE = 14, 2
CELL_PIXELS = PATCH_PIXELS * MERGE
# the largest picture, in cells
MAX_CELLS = 1024


def _pixels(cell_pixels: int) -> dict[str, int]:
    """Sizes between which a picture is left as it is."""
    return {"shortest_edge": cell_pixels**2, "longest_edge": MAX_CELLS * cell_pixels**2}


def _patches(patch_pixels: int, frames: int = 2) -> dict[str, int]:
    return {"patch_size": patch_pixels, "merge_size": MERGE, "temporal_patch_size": frames}


def qwen2_vl(vocabulary: Qwen2Tokenizer, kind: str = "Qwen2VLProcessor") -> Any:
    """Of Qwen2-VL."""
    import transformers

    sizes = {"size": _pixels(CELL_PIXELS), **_patches(PATCH_PIXELS)}
    return getattr(transformers, kind)(
        image_processor=transformers.Qwen2VLImageProcessor(**sizes),
        tokenizer=vocabulary,
        video_processor=transformers.Qwen2VLVideoProcessor(**sizes),
    )


def qwen2_5_omni(vocabulary: Qwen2Tokenizer) -> Any:
    """Of the thinker of Qwen2.5-Omni, which hears too."""
    import transformers

    sizes = {"size": _pixels(CELL_PIXELS), **_patches(PATCH_PIXELS)}
    return transformers.Qwen2_5OmniProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**sizes),
        video_processor=transformers.Qwen2VLVideoProcessor(**sizes),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=128),
        tokenizer=vocabulary,
    )


def qwen3_vl(vocabulary: Qwen2Tokenizer) -> Any:
    """Of Qwen3-VL: patches of 16 pixels."""
    import transformers

    sizes = {"size": _pixels(32), **_patches(16)}
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**sizes),
        tokenizer=vocabulary,
        video_processor=transformers.Qwen3VLVideoProcessor(**sizes),
    )


def glm4v(vocabulary: Qwen2Tokenizer) -> Any:
    """Of GLM-4.1V."""
    import transformers

    sizes = {"size": _pixels(2 * CELL_PIXELS), **_patches(PATCH_PIXELS)}
    return transformers.Glm4vProcessor(
        image_processor=transformers.Glm4vImageProcessor(**sizes),
        tokenizer=vocabulary,
        video_processor=transformers.Glm4vVideoProcessor(**sizes),
    )


def internvl(vocabulary: Qwen2Tokenizer) -> Any:
    """Of InternVL: one square of 16 tokens."""
    import transformers

    size = {"height": 112, "width": 112}
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        tokenizer=vocabulary,
        video_processor=transformers.InternVLVideoProcessor(size=size),
        image_seq_length=16,
    )


def pixtral(merge: int) -> Any:
    """Of Pixtral, and of Mistral 3, which joins `merge` x `merge` patches."""

    def make(vocabulary: Qwen2Tokenizer) -> Any:
        import transformers

        images = transformers.PixtralImageProcessor(
            patch_size={"height": PATCH_PIXELS * merge, "width": PATCH_PIXELS * merge},
            size={"longest_edge": 448},
        )
        return transformers.PixtralProcessor(
            image_processor=images,
            tokenizer=vocabulary,
            patch_size=PATCH_PIXELS,
            spatial_merge_size=merge,
        )

    return make


TILE = {"height": 56, "width": 56}
TILINGS = [[56, 56], [56, 112], [112, 56], [112, 112]]


def llava_onevision(vocabulary: Qwen2Tokenizer) -> Any:
    """Of LLaVA-OneVision: tiles of 16 tokens."""
    import transformers

    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size=TILE, image_grid_pinpoints=TILINGS
        ),
        tokenizer=vocabulary,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=TILE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )


def idefics3(vocabulary: Qwen2Tokenizer) -> Any:
    """Of Idefics3: up to four parts of a picture and the whole, 16 tokens each."""
    import transformers

    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 224}, max_image_size={"longest_edge": 112}
    )
    return transformers.Idefics3Processor(images, vocabulary, image_seq_len=16)


def paddleocr_vl(vocabulary: Qwen2Tokenizer) -> Any:
    """Of PaddleOCR-VL."""
    import transformers

    images = transformers.PaddleOCRVLImageProcessor(
        size=_pixels(CELL_PIXELS), **_patches(PATCH_PIXELS, frames=1)
    )
    return transformers.PaddleOCRVLProcessor(image_processor=images, tokenizer=vocabulary)


def lfm2_vl(vocabulary: Qwen2Tokenizer) -> Any:
    """Of LFM2-VL."""
    import transformers

    return transformers.Lfm2VlProcessor(transformers.Lfm2VlImageProcessor(), vocabulary)


def gemma3(picture_tokens: int) -> Any:
    """Of Gemma 3: as many tokens a picture."""

    def make(vocabulary: Qwen2Tokenizer) -> Any:
        import transformers

        images = transformers.Gemma3ImageProcessor(size={"height": 112, "width": 112})
        return transformers.Gemma3Processor(images, vocabulary, image_seq_length=picture_tokens)

    return make


def paligemma(vocabulary: Qwen2Tokenizer) -> Any:
    """Of PaliGemma: 64 tokens a picture."""
    import transformers

    images = transformers.SiglipImageProcessor(size={"height": 112, "width": 112})
    images.image_seq_length = 64
    # stands behind pictures
    vocabulary.bos_token = "<|endoftext|>"
    return transformers.PaliGemmaProcessor(images, vocabulary)


def bagel(vocabulary: Qwen2Tokenizer) -> Any:
    """Of Bagel: 64 tokens a picture."""
    import transformers
    from vllm.transformers_utils.processors.bagel import BagelProcessor

    images = transformers.SiglipImageProcessor(size={"height": 112, "width": 112})
    return BagelProcessor(images, vocabulary)


def moondream3(vocabulary: Qwen2Tokenizer) -> Any:
    """Of Moondream 3: crops of 27 x 27 patches, which become as many tokens."""
    from vllm.transformers_utils.processors.moondream3 import Moondream3Processor

    return Moondream3Processor(vocabulary)


def minicpmv4_6(vocabulary: Qwen2Tokenizer) -> Any:
    """Of MiniCPM-V 4.6: one slice a picture."""
    import transformers

    sizes = {"scale_resolution": 224, "max_slice_nums": 1, "patch_size": PATCH_PIXELS}
    return transformers.MiniCPMV4_6Processor(
        image_processor=transformers.MiniCPMV4_6ImageProcessor(**sizes),
        video_processor=transformers.MiniCPMV4_6VideoProcessor(**sizes),
        tokenizer=vocabulary,
    )
