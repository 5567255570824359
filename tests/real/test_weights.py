"""The conversion against an independent reading of the file, and against transformers."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from benchmarks.real import prose, weights
from benchmarks.real.packages import Member

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 32


def q4_1(raw: np.ndarray) -> np.ndarray:
    """Blocks of 32: scale and minimum in half precision, then 16 bytes of two numbers each, the
    low halves first (ggml's `block_q4_1`)."""
    blocks = raw.reshape(-1, 4 + BLOCK // 2)
    scale, least = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (nibbles * scale[:, None] + least[:, None]).ravel()


def q8_0(raw: np.ndarray) -> np.ndarray:
    """Blocks of 32: scale in half precision, then signed bytes (ggml's `block_q8_0`)."""
    blocks = raw.reshape(-1, 2 + BLOCK)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return (blocks[:, 2:].copy().view(np.int8) * scale).ravel()


@pytest.fixture(scope="module")
def written(smollm2: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(smollm2 / "model.safetensors")


@pytest.mark.parametrize(
    ("stored", "name", "read"),
    [
        ("token_embd.weight", "model.embed_tokens.weight", q8_0),
        ("blk.7.ffn_up.weight", "model.layers.7.mlp.up_proj.weight", q4_1),
        ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight", q4_1),
    ],
)
def test_numbers_are_those_of_the_file(
    written: dict[str, torch.Tensor], stored: str, name: str, read: Any
) -> None:
    from gguf import GGUFReader

    (tensor,) = (t for t in GGUFReader(weights.GGUF.fetch()).tensors if t.name == stored)
    expected = torch.from_numpy(read(np.asarray(tensor.data).ravel().view(np.uint8)))
    expected = expected.view(written[name].shape).bfloat16()
    torch.testing.assert_close(written[name], expected, rtol=0, atol=0)


def test_pairs_of_a_head_are_set_apart() -> None:
    rows = np.arange(8)[:, None]
    assert weights.halves_apart(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_all_weights_are_written(smollm2: Path, written: dict[str, torch.Tensor]) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["num_hidden_layers"], config["rope_theta"]) == (30, 100000.0)
    assert len(written) == 9 * 30 + 2 and config["tie_word_embeddings"]


def perplexity(model: Any, tokens: list[int]) -> float:
    with torch.inference_mode():
        ids = torch.tensor([tokens])
        return math.exp(model(ids, labels=ids).loss.item())


def test_perplexity_is_that_of_another_reader_of_the_file(smollm2: Path, tokenizer: Any) -> None:
    """transformers reads GGUF itself; a wrong order of rows, rotation or vocabulary would give a
    perplexity of thousands, as the same words turned around nearly do."""
    from transformers import AutoModelForCausalLM

    file = weights.GGUF.fetch()
    ours = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    words = " ".join(prose.paragraphs()[100:104])
    tokens = tokenizer(words)["input_ids"]
    found = perplexity(ours, tokens)
    assert found == pytest.approx(perplexity(theirs, tokens), rel=0.01)
    assert 8 * found < perplexity(ours, tokenizer(" ".join(words.split()[::-1]))["input_ids"])


def test_numbers_are_split_into_digits(tokenizer: Any) -> None:
    assert tokenizer.tokenize(" is 3966.")[-5:] == ["3", "9", "6", "6", "."]
    text = "<|im_start|>user\nWhat's kettle-3966?<|im_end|>\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == 1 and tokenizer.decode(ids) == text


def test_another_file_than_pinned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Member, "_download", lambda _: b"other")
    with pytest.raises(ValueError, match="has SHA-256"):
        Member("some==1", "a/b.txt", "0" * 64).fetch()
