"""8-bit keys and values: what stock vLLM answers with them, and half the bytes of a quota."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e import test_recurrent, test_windows
from tests.e2e.conftest import MODELS
from tests.e2e.engines import run, run_each, tokens_of
from vllm_budgetkv.testing import models, sliding
from vllm_budgetkv.testing.recurrent import build_qwen3_5

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

QUESTION = {"text": "Which letter?"}
REQUESTS: list[dict[str, Any]] = [
    {"name": "text", "content": [{"text": "What does the sign say? " * 20}], "logprobs": 5},
    {"name": "image", "content": [{"image": 1}, QUESTION], "arrives": 1, "logprobs": 5},
    {"name": "video", "content": [{"video": 16}, QUESTION], "arrives": 2, "logprobs": 5},
]
VIDEOS = [
    {"name": f"video{i}", "content": [{"video": 96, "seed": i}, QUESTION], "max_tokens": 24}
    for i in range(4)
]
FITS = {"policy": "hybrid", "page_quota": 40, "chunk_tokens": 40, "check_ledger": True}
QUOTA_BLOCKS = 5
SMALL = FITS | {
    "page_quota": QUOTA_BLOCKS,
    "chunk_tokens": 24,
    "decode_interval_tokens": 8,
    "window_tokens": 8,
}
REMEMBERS = SMALL | {"page_quota": 8, "host_memory": "64MiB"}
ENGINE = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "num_gpu_blocks_override": 200}
# of keys and values; their scales differ by layer in the model that has some
SCALES = {0: (0.37, 0.021), 1: (0.11, 0.3)}
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "kv_cache_scheme": SCHEME,
    "config_groups": {},
    "format": "dense",
    "ignore": [],
}


@pytest.fixture(scope="module")
def scaled_model(vision_model: Path) -> Path:
    """The same model as llm-compressor leaves one whose keys and values it has measured."""

    def write(folder: Path) -> None:
        shutil.copytree(vision_model, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = QUANTIZATION
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        weights = load_file(folder / "model.safetensors")
        for layer, scales in SCALES.items():
            (name,) = (key for key in weights if key.endswith(f"{layer}.self_attn.k_proj.weight"))
            for part, scale in zip("kv", scales, strict=True):
                weights[name.replace("k_proj.weight", f"{part}_scale")] = torch.tensor([scale])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return models.cached(MODELS, f"{vision_model.name}-scaled", write)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, scaled_model: Path) -> dict[str, Any]:
    """Of a checkpoint that says itself how it is stored, so no option does."""
    runs = {
        "stock": {"budget": None, "requests": REQUESTS, "rounds": True},
        "fits": {"budget": FITS, "requests": REQUESTS},
        "small": {"budget": SMALL, "requests": VIDEOS},
        "remembers": {"budget": REMEMBERS, "requests": VIDEOS},
    }
    return run_each(tmp_path_factory.mktemp("scaled"), scaled_model, runs, **ENGINE)


def check_same(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    assert tokens_of(ours) == tokens_of(stock)
    for name, answer in stock["answers"].items():
        pairs = zip(ours["answers"][name]["logprobs"], answer["logprobs"], strict=True)
        for told, expected in pairs:
            assert told == pytest.approx(expected, abs=1e-5)


def test_what_fits_is_answered_as_stock_answers(answers: dict[str, Any]) -> None:
    check_same(answers["fits"], answers["stock"])
    assert len({tuple(tokens) for tokens in tokens_of(answers["stock"]).values()}) == len(REQUESTS)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_without_scales(tmp_path: Path, vision_model: Path, runner: str) -> None:
    runs = {"stock": {"budget": None, "requests": REQUESTS, "rounds": True}}
    stock = run_each(tmp_path, vision_model, runs, kv_cache_dtype="fp8", **ENGINE)["stock"]
    engine = {"kv_cache_dtype": "fp8", "runner": runner, **ENGINE}
    check_same(run(tmp_path, vision_model, REQUESTS, budget=FITS, **engine), stock)


def test_compressed_requests_stay_inside_their_quota(answers: dict[str, Any]) -> None:
    for name, quota_blocks in (("small", QUOTA_BLOCKS), ("remembers", REMEMBERS["page_quota"])):
        answer = answers[name]
        assert answer["running_at_once"] == len(VIDEOS)
        assert max(answer["held"].values()) <= quota_blocks
        assert answer["engine"]["leftovers"] == 0
        assert all(one["said"]["prompt_compressions"] > 0 for one in answer["answers"].values())

    told = [one["said"]["recall"] for one in answers["remembers"]["answers"].values()]
    assert told == ["on"] * len(VIDEOS)


def test_beside_windows_and_learned_sinks(tmp_path: Path) -> None:
    """Layers with windows are vLLM's, and so is how their keys and values are rounded."""
    model = sliding.build("gpt_oss", MODELS)
    requests = test_windows.long_requests(2)
    runs = {
        "stock": {"budget": None, "requests": test_windows.REQUESTS, "rounds": True},
        "fits": {"budget": test_windows.FITS, "requests": test_windows.REQUESTS, "rounds": True},
        "tight": {"budget": {"policy": "hybrid", **test_windows.TIGHT}, "requests": requests},
    }
    answers = run_each(tmp_path, model, runs, kv_cache_dtype="fp8", **test_windows.ENGINE)
    assert tokens_of(answers["fits"]) == tokens_of(answers["stock"])
    test_windows.check_bound(answers["tight"], requests)


def test_beside_recurrent_state(tmp_path: Path) -> None:
    requests = test_recurrent.asking(test_recurrent.REQUESTS)
    runs = {
        "stock": {"budget": None, "requests": requests, "rounds": True},
        "fits": {"budget": test_recurrent.FITS, "requests": requests},
    }
    engine = test_recurrent.ENGINE | {"kv_cache_dtype": "fp8"}
    answers = run_each(tmp_path, build_qwen3_5(MODELS), runs, **engine)
    for name, expected in answers["stock"]["answers"].items():
        test_recurrent.check_close(answers["fits"]["answers"][name], expected)


def test_a_block_takes_about_half(tmp_path: Path, vision_model: Path) -> None:
    """K and V take a quarter of float32's bytes, half of bfloat16's; digests and positions stay."""
    runs = {"plain": {"budget": SMALL, "requests": REQUESTS[:1]}}
    plain = run_each(tmp_path, vision_model, runs, dtype="bfloat16", **ENGINE)["plain"]
    stored = run_each(
        tmp_path, vision_model, runs, dtype="bfloat16", kv_cache_dtype="fp8", **ENGINE
    )["plain"]
    block_bytes = [answer["engine"]["sizes"]["block_bytes"] for answer in (stored, plain)]
    assert 0.5 < block_bytes[0] / block_bytes[1] < 0.6
    assert len(stored["answers"]["text"]["tokens"]) == 16
