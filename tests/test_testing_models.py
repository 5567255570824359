"""The generated models are what their sizes say, and the same every time."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from vllm_budgetkv.testing import frames, models, triton_cpu
from vllm_budgetkv.testing.shapes import CELL_PIXELS, DecoderShape

if TYPE_CHECKING:
    from pathlib import Path

BUILDERS = {
    "qwen2_5_vl": models.build_qwen2_5_vl,
    "qwen2": models.build_qwen2,
    "llama": models.build_llama,
}


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_model_is_written_once_and_alike(kind: str, tmp_path: Path) -> None:
    first = BUILDERS[kind](tmp_path / "a")
    written = (first / "config.json").stat().st_mtime_ns
    assert BUILDERS[kind](tmp_path / "a") == first
    assert (first / "config.json").stat().st_mtime_ns == written
    second = BUILDERS[kind](tmp_path / "b")
    assert second.name == first.name
    left, right = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == [first.name]


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("qwen2_5_vl", {"layers": 3, "hidden": 256, "heads": 8, "kv_heads": 1}),
        ("qwen2_5_vl", {"hidden": 256, "head_dim": 64, "dtype": "bfloat16"}),
        ("qwen2", {"layers": 1, "kv_heads": 4, "vocab_size": 1000}),
        ("llama", {"hidden": 96, "heads": 3, "kv_heads": 3, "seed": 7}),
    ],
    ids=["vl-mqa", "vl-bf16-d64", "qwen2-mha", "llama-odd"],
)
def test_sizes_arrive_in_the_files(kind: str, sizes: dict[str, int], tmp_path: Path) -> None:
    folder = BUILDERS[kind](tmp_path, **sizes)
    shape = DecoderShape(**sizes)
    config = AutoConfig.from_pretrained(folder).get_text_config()
    assert config.num_hidden_layers == shape.layers
    assert config.num_key_value_heads == shape.kv_heads
    weights = load_file(folder / "model.safetensors")
    keys = [weight for name, weight in weights.items() if name.endswith("k_proj.weight")]
    assert [tuple(weight.shape) for weight in keys] == [
        (shape.kv_heads * shape.head_dim, shape.hidden)
    ] * shape.layers
    assert str(keys[0].dtype) == f"torch.{shape.dtype}"
    assert sum(shape.mrope_section) == shape.head_dim // 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, "kv_heads=3"),
        ({"hidden": 100}, "4 x 32 = 128"),
        ({"vocab_size": 300}, "vocab_size=300"),
        ({"hidden": 16, "heads": 4, "kv_heads": 2, "head_dim": 4}, "head_dim=4"),
    ],
    ids=["gqa", "hidden", "vocabulary", "head-size"],
)
def test_sizes_that_do_not_fit_are_refused(
    sizes: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        models.build_qwen2(tmp_path, **sizes)
    assert not any(tmp_path.iterdir())


def test_tokenizer_round_trips_text_and_special_tokens(qwen2_5_vl: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen2_5_vl)
    for text in (
        "Which letter does the video show?",
        "naïve 图像 \n\t 7",
        "<|im_start|>x<|im_end|>",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("<|vision_start|><|image_pad|><|vision_end|>").input_ids) == 3
    config = json.loads((qwen2_5_vl / "config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<|video_pad|>") == config["video_token_id"]


def test_greedy_answers_are_printable_and_never_end(qwen2_5_vl: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen2_5_vl)
    output = load_file(qwen2_5_vl / "model.safetensors")["lm_head.weight"]
    answers = output.abs().sum(dim=1).nonzero().flatten().tolist()
    assert len(answers) > 200
    assert tokenizer.eos_token_id not in answers
    assert all(tokenizer.decode([token]).isprintable() for token in answers)


@pytest.mark.parametrize("num_frames", [1, 2, 7, 16])
def test_a_token_is_a_cell_of_two_frames(num_frames: int, qwen2_5_vl: Path) -> None:
    processor = AutoProcessor.from_pretrained(qwen2_5_vl)
    width, height = 5 * CELL_PIXELS, 3 * CELL_PIXELS
    video = frames.render_video(num_frames, size_pixels=(width, height))
    assert video.shape == (num_frames, height, width, 3)
    text = "<|vision_start|><|video_pad|><|vision_end|>"
    batch = processor(text=[text], videos=[video], do_sample_frames=False, return_tensors="pt")
    assert batch["input_ids"].shape[1] == 2 + 3 * 5 * -(-num_frames // 2)


def test_a_sign_is_drawn_on_whole_cells_of_the_named_frames_only() -> None:
    size = (4 * CELL_PIXELS, 4 * CELL_PIXELS)
    plain = frames.render_video(6, size_pixels=size, signs={})
    signed = frames.render_video(6, size_pixels=size, signs={4: "K7"})
    changed = (plain != signed).any(axis=(2, 3)).nonzero()
    assert set(changed[0].tolist()) == {4}
    difference = (plain[4] != signed[4]).any(axis=2).reshape(4, CELL_PIXELS, 4, CELL_PIXELS)
    assert difference.any(axis=(1, 3)).sum() == 1


def test_data_urls_hold_the_frames() -> None:
    video = frames.render_video(3, seed=5)
    header, *parts = frames.video_data_url(video).split(",")
    assert header == "data:video/jpeg;base64"
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(part)))) for part in parts]
    assert len(decoded) == 3
    assert np.abs(np.stack(decoded).astype(int) - video).mean() < 6


def test_a_frame_smaller_than_a_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="one cell of 28 pixels"):
        frames.render_frame(0, size_pixels=(27, 112))


def test_the_triton_stand_in_reaches_new_processes_and_changes_nothing_else() -> None:
    code = (
        "import sys, os; assert 'triton' not in sys.modules\n"
        "from triton.backends import backends\n"
        "assert not backends['cpu'].driver.is_active()\n"
        "sys.stdout.write(','.join(sorted(backends)))"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, env=os.environ | triton_cpu.environment(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "cpu" in run.stdout.split(",")
    assert len(run.stdout.split(",")) > 1
