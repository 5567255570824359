"""LoRA adapters of small models, and the models with an adapter merged into their weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_budgetkv.testing.models import cached

RANK, ALPHA = 8, 16
# of every layer; queries among them, so that a look-ahead without the adapter asks otherwise
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
# entries of a factor, in parts of what a matrix of their size has: what the adapter adds is about
# as large as the weights that it is added to
STRENGTH = 0.5


class Adapter(NamedTuple):
    """An adapter and what it makes of its model.

    Attributes:
        folder: of the adapter, as peft writes it.
        merged: of the model with the adapter in its weights.
    """

    folder: Path
    merged: Path


def build_adapter(cache: Path, base: Path, seed: int) -> Adapter:
    """Writes a random adapter of attention's projections.

    Args:
        cache: folder where finished models are kept.
        base: folder of the model, in one file of weights.
        seed: of the adapter.

    Returns:
        Its folder, and that of the merged model.
    """
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    name = f"{base.name}-adapter{seed}-{source}"
    weights = _load(base)
    adapter = _factors(weights, seed)
    return Adapter(
        cached(cache, name, lambda folder: _write_adapter(folder, base, adapter)),
        cached(cache, f"{name}-merged", lambda folder: _write_merged(folder, base, adapter)),
    )


def _load(base: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(base / "model.safetensors")


def _factors(
    weights: dict[str, torch.Tensor], seed: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A [r, in] and B [out, r], by the name of the weight that B A is added to."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in sorted(weights):
        if name.startswith("visual") or name.split(".")[-2] not in TARGETS:
            continue
        if not name.endswith("weight"):
            continue
        weight = weights[name]
        size = (STRENGTH * weight.std() * RANK**-0.5 * RANK / ALPHA) ** 0.5
        down = torch.randn(RANK, weight.shape[1], generator=generator) * size
        up = torch.randn(weight.shape[0], RANK, generator=generator) * size
        factors[name] = (down, up)
    return factors


def _write_adapter(
    folder: Path, base: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for name, (down, up) in factors.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = down
        tensors[f"{module}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(TARGETS),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")


def _write_merged(
    folder: Path, base: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    from safetensors.torch import save_file

    for file in base.iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, folder / file.name)
    weights = _load(base)
    for name, (down, up) in factors.items():
        weights[name] = weights[name] + up @ down * (ALPHA / RANK)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
