"""Where a plan's figures come from: files of weights, the processor, the model's architecture."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from tests.cli.folders import write_qwen3_vl_8b
from vllm_budgetkv.cli.figures import size_text
from vllm_budgetkv.cli.weights import weights_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import RunPlan

GPU = ("--gpu-memory", "80GiB")


def weights_in(plan: dict[str, Any]) -> dict[str, Any]:
    return plan["pool"]["shares"]["weights"]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (57344, "56.0 KiB"),
        (5 << 30, "5.00 GiB"),
        (3 << 42, "12.0 TiB"),
    ],
)
def test_sizes_are_written(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_from_the_headers_of_the_files(
    qwen2_5_vl: Path, plan_of: RunPlan, dtype: str
) -> None:
    """In the dtype in which they are loaded, not in that in which they are stored."""
    stored = load_file(qwen2_5_vl / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    elements = sum(tensor.numel() for tensor in stored.values())
    found = weights_in(plan_of("--model", str(qwen2_5_vl), *GPU, "--dtype", dtype))
    assert found["bytes"] == elements * getattr(torch, dtype).itemsize
    assert found["origin"] == "read"


def test_several_files_count_together(qwen2_5_vl: Path, tmp_path: Path, plan_of: RunPlan) -> None:
    whole = weights_in(plan_of("--model", str(qwen2_5_vl), *GPU))
    folder = shutil.copytree(qwen2_5_vl, tmp_path / "model")
    stored = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((stored[::2], stored[1::2])):
        save_file(dict(part), folder / f"model-0000{number}.safetensors")
    assert weights_in(plan_of("--model", str(folder), *GPU)) == whole


def test_weights_from_an_index_alone(seven_b: Path, tmp_path: Path, plan_of: RunPlan) -> None:
    folder = shutil.copytree(seven_b, tmp_path / "model")
    index = {"metadata": {"total_size": 16_584_333_312}, "weight_map": {}}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index), encoding="utf-8")
    found = weights_in(plan_of("--model", str(folder), *GPU))
    assert (found["bytes"], found["origin"]) == (16_584_333_312, "read")


def test_weights_from_the_architecture(bare: Path, plan_of: RunPlan) -> None:
    """8,292,166,656 is what the model card's files of Qwen2.5-VL-7B hold."""
    found = weights_in(plan_of("--model", str(bare), *GPU))
    assert (found["bytes"], found["origin"]) == (2 * 8_292_166_656, "estimate")


def test_weights_as_given(bare: Path, plan_of: RunPlan) -> None:
    found = weights_in(plan_of("--model", str(bare), *GPU, "--weights", "7GiB"))
    assert (found["bytes"], found["origin"]) == (7 << 30, "given")


def test_quantised_weights_without_files_must_be_given(
    bare: Path, tmp_path: Path, plan_of: RunPlan
) -> None:
    folder = shutil.copytree(bare, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="no weights of .* under fp8 .* --weights 15GiB"):
        plan_of("--model", str(folder), *GPU)
    assert plan_of("--model", str(folder), *GPU, "--weights", "9GiB")["pool"]["bytes"] > 0


REMOTE: Any = SimpleNamespace(
    model="maker/model", revision=None, quantization=None, dtype=torch.bfloat16
)


def test_weights_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = SimpleNamespace(parameter_count={"F32": 1000, "I32": 10})
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda *_, **__: counts)
    assert weights_of(REMOTE, None).num_bytes == 2 * 1000 + 4 * 10
    packed = SimpleNamespace(**{**vars(REMOTE), "quantization": "awq"})
    packed.hf_config = SimpleNamespace(quantization_config={"quant_method": "awq"})
    assert weights_of(packed, None).num_bytes == 4 * 1000 + 4 * 10
    # a checkpoint that says how to store keys and values, and nothing of weights
    scheme = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}, "config_groups": {}}
    packed.hf_config = SimpleNamespace(quantization_config=scheme)
    assert weights_of(packed, None).num_bytes == 2 * 1000 + 4 * 10


@pytest.mark.parametrize("error", [OSError("offline"), HfHubHTTPError.__bases__[0]("no route")])
def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", fail)
    with pytest.raises(ValueError, match="weights of maker/model could not be read .* --weights"):
        weights_of(REMOTE, None)


def test_shares_and_pool_are_all_that_vllm_takes(seven_b: Path, plan_of: RunPlan) -> None:
    arguments = ("--gpu-memory-utilization", "0.8", "--reserve", "3GiB")
    pool = plan_of("--model", str(seven_b), *GPU, *arguments)["pool"]
    assert pool["total"]["bytes"] == 64 << 30
    shares = {name: share["bytes"] for name, share in pool["shares"].items()}
    assert pool["bytes"] == (64 << 30) - sum(shares.values())
    assert shares["CUDA, graphs, NCCL"] == 3 << 30
    assert pool["is_estimate"]


def test_a_processor_that_is_missing_is_said(bare: Path, plan_of: RunPlan) -> None:
    plan = plan_of("--model", str(bare), *GPU, "--tokens", "100000")
    encoder = plan["encoder"]
    assert encoder["cache"] is None and encoder["tower"] is None
    assert "model's processor" in encoder["unknown"][0]
    assert "the vision tower" not in plan["pool"]["shares"]


def test_a_text_model_has_no_encoder(llama: Path, plan_of: RunPlan) -> None:
    plan = plan_of("--model", str(llama), "--tokens", "4096", "--kv-page-quota", "64")
    assert plan["encoder"] is None


def test_deepstack_widens_the_encoder_cache(tmp_path: Path, plan_of: RunPlan) -> None:
    """Qwen3-VL-8B: 144 KiB of KV and 32 KiB of embeddings a token."""
    folder = write_qwen3_vl_8b(tmp_path / "Qwen3-VL-8B")
    plan = plan_of("--model", str(folder), "--tokens", "200000", "--kv-page-quota", "640")
    assert plan["full_cache"]["token_bytes"] == 144 * 1024
    encoder = plan["encoder"]
    assert encoder["cache"]["bytes"] == encoder["cache_tokens"] * 32 * 1024


def test_a_longer_video_takes_no_more(seven_b: Path, plan_of: RunPlan) -> None:
    """It is computed in groups of frames; pictures are whole."""
    arguments = ("--model", str(seven_b), "--tokens", "100000", "--kv-page-quota", "640")
    pictures = '{"image": {"count": 4, "width": 560, "height": 560}, "video": 0}'
    large = plan_of(*arguments)["encoder"]
    bounded = plan_of(*arguments, "--limit-mm-per-prompt", pictures)["encoder"]
    assert set(bounded["item_tokens"]) == {"image"}
    assert large["item_tokens"]["video"] == large["whole_tokens"] > large["cache_tokens"]
    assert bounded["whole_tokens"] is None
    for name in ("cache", "tower"):
        assert bounded[name]["bytes"] == large[name]["bytes"]


def test_a_machine_without_any_device(seven_b: Path) -> None:
    """vLLM's build for GPUs where there is none: its parser fails there by itself."""
    program = (
        "import importlib.metadata as m, sys\n"
        "real = m.version\n"
        "m.version = lambda name: '0.32.0' if name.startswith('vllm') else real(name)\n"
        "from vllm_budgetkv.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["plan", "--model", str(seven_b), "--tokens", "90000", "--kv-page-quota", "64"]
    process = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program, *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["under_quota"]["blocks"] == 64
