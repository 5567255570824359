"""Which items a front end refuses, and with which options videos stay whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_budgetkv.start.frame_groups import (
    GRID,
    PIXELS,
    frames_of,
    reasons_against,
    reasons_to_keep_whole,
)
from vllm_budgetkv.start.request_check import check_items, refusal

MOST_TOKENS = 1000


def engine(**changes: Any) -> Any:
    """The parts of a configuration that decide, without any reason against groups."""
    usual: dict[str, Any] = {
        "pruned": False,
        "mm_processor_cache_type": "lru",
        "enable_mm_embeds": False,
        "enable_prompt_embeds": False,
        "disable_chunked_mm_input": False,
        "max_num_batched_tokens": 512,
        "pipeline_parallel_size": 1,
    }
    given = SimpleNamespace(**(usual | changes))
    given.is_multimodal_pruning_enabled = lambda: given.pruned
    given.lora_config = given.ec_transfer_config = None
    given.multimodal_config = given.model_config = given.scheduler_config = given
    given.parallel_config = given
    return given


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ({"pruned": True}, "--video-pruning-rate"),
        ({"mm_processor_cache_type": "shm"}, "--mm-processor-cache-type shm"),
        ({"enable_mm_embeds": True}, "--enable-mm-embeds"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"disable_chunked_mm_input": True}, "--disable-chunked-mm-input"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
    ],
)
def test_options_that_keep_videos_whole(option: dict[str, Any], flag: str) -> None:
    assert reasons_against(engine()) == []
    (reason,) = reasons_against(engine(**option))
    assert flag in reason


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        (
            "lora_config",
            SimpleNamespace(enable_tower_connector_lora=True),
            "--enable-tower-connector-lora",
        ),
        ("ec_transfer_config", SimpleNamespace(), "--ec-transfer-config"),
    ],
)
def test_what_else_keeps_them_whole_is_known_in_a_front_end(
    field: str, value: Any, flag: str
) -> None:
    given = engine()
    assert reasons_to_keep_whole(given) == []
    setattr(given, field, value)
    (reason,) = reasons_to_keep_whole(given)
    assert flag in reason


def test_a_text_model_has_no_reason() -> None:
    assert reasons_against(engine(multimodal_config=None)) == []


class Place(SimpleNamespace):
    offset, length = 0, 1

    def get_num_embeds(self) -> int:
        return int(self.tokens)


def item(
    tokens: int, num_frames: int = 1, modality: str = "video", *, is_known: bool = False
) -> Any:
    """An item of equal frames; of one that is known, fields stayed in the front end's cache."""
    frame_rows = 4 * tokens // num_frames
    data = {
        GRID: SimpleNamespace(data=torch.tensor([num_frames, 2, frame_rows // 2])),
        PIXELS: SimpleNamespace(data=torch.zeros(num_frames * frame_rows, 1)),
    }
    return SimpleNamespace(
        data=None if is_known else data, modality=modality, mm_position=Place(tokens=tokens)
    )


@pytest.mark.parametrize(
    ("feature", "resumable", "words"),
    [
        (item(1000, modality="image"), False, None),
        (item(1001, modality="image"), False, "one image of 1001 tokens is computed as a whole"),
        (item(10**6, 10**3), False, None),
        (item(2 * 1001, 2), False, "frames of 1001 tokens, but the encoder takes 1000"),
        # a session's videos are not cut
        (item(10**6, 10**3), True, "one video of 1000000 tokens is computed as a whole"),
        # it came before, and nothing is left here to say how its frames are
        (item(10**6, 10**3, is_known=True), False, None),
        # how large it is can be told
        (item(10**6, 10**3, is_known=True), True, "one video of 1000000 tokens is computed as a"),
    ],
)
def test_what_the_encoder_can_never_take_is_refused(
    feature: Any, resumable: bool, words: str | None
) -> None:
    request: Any = SimpleNamespace(mm_features=[feature], resumable=resumable)
    if words is None:
        check_items(request, MOST_TOKENS)
        return
    with pytest.raises(refusal(), match=words):
        check_items(request, MOST_TOKENS)


def test_frames_of_a_video() -> None:
    frames = frames_of(item(60, 5))
    assert frames is not None
    assert (frames.num_frames, frames.frame_tokens, frames.frame_rows) == (5, 12, 48)
