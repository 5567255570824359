"""Each of vLLM's models whose attention is special is known, and so is what refuses it.

Read from vLLM's source: a new special model fails here before a user meets it.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import vllm

from vllm_budgetkv.start import refused_models

if TYPE_CHECKING:
    from collections.abc import Iterator

VLLM = Path(vllm.__file__).parent
LAYERS = {
    "ChunkedLocalAttention",
    "PrefillPrefixLMAttention",
    "RSWAAttention",
    "StaticSinkAttention",
}
BASES = LAYERS | {"Attention", "AttentionLayerBase"}
ARGUMENTS = {
    "alibi_slopes",
    "chunk_lookback",
    "dual_chunk_attention_config",
    "head_size_v",
    "kv_sharing_target_layer_name",
    "logits_soft_cap",
    "sinks",
    "use_alibi_sqrt",
}
# most files have none of them and need not be parsed
WORDS = ARGUMENTS | LAYERS | {"AttentionLayerBase", "(Attention"}

FIELD = "a field in `refused_models.SWITCHES`"
NAME = "a name in `refused_models.ALWAYS`"
SERVED = "served: `refused_models.WINDOWS_BESIDE`"
WINDOW = "`get_sliding_window`"
KNOWN = {
    "bloom": "`uses_alibi`",
    "deepseek_v2": "`use_mla` and `rswa_window`",
    "deepseek_v4": "`use_mla`",
    "deepseek_v41": "`use_mla`",
    "extract_hidden_states": "a draft model: speculative decoding",
    "falcon": "`uses_alibi`",
    "gemma2": SERVED,
    "gemma3": "nothing to refuse: its soft cap is None",
    "gemma3n": FIELD,
    "gemma4": FIELD,
    "gemma4_mtp": "a draft model: speculative decoding",
    "gpt_oss": SERVED,
    "granite": "`refused_models._sinks_by_default`",
    "granitemoe": "`refused_models._sinks_by_default`",
    "hrm_text": NAME,
    "hyperclovax": FIELD,
    "inkling": NAME,
    "interns1_pro": FIELD,
    "iquest_loopcoder": NAME,
    "k2_horizon": FIELD,
    "kimi_k3": "`use_mla`",
    "laguna": FIELD,
    "llama4": SERVED,
    "mimo_v2": SERVED,
    "minimax_m3": NAME,
    "muse_glimmer": WINDOW,
    "openai_privacy_filter": "`runner_type`",
    "openpangu": FIELD,
    "qwen2": FIELD,
    "qwen2_moe": FIELD,
    "qwen3": FIELD,
    "qwen3_dflash": "a draft model: speculative decoding",
    "qwen3_moe": FIELD,
    "qwen4_exp": "`is_hybrid`",
    "rnj1": WINDOW,
    "step1": NAME,
    "whisper_causal": NAME,
}

# in vLLM 0.33 only
NEWER = {"flint": NAME, "step5": NAME}


def special_models() -> Iterator[str]:
    """Files and folders of models that give a layer of attention something of `ARGUMENTS`."""
    for folder in (VLLM / "model_executor" / "models", VLLM / "models"):
        for path in folder.rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            if not any(word in source for word in WORDS):
                continue
            if any(is_special(node) for node in ast.walk(ast.parse(source))):
                yield path.relative_to(folder).parts[0].removesuffix(".py")


def is_special(node: ast.AST) -> bool:
    if isinstance(node, ast.ClassDef):
        return any(name_of(base) in BASES for base in node.bases)
    if isinstance(node, ast.Name):
        return node.id in LAYERS
    if not isinstance(node, ast.Call):
        return False
    is_layer = name_of(node.func).lower().endswith(("attention", "attn_cls"))
    return is_layer and any(keyword.arg in ARGUMENTS for keyword in node.keywords)


def name_of(node: ast.expr) -> str:
    return ast.unparse(node).split(".")[-1]


def test_every_special_model_is_known() -> None:
    found = set(special_models())
    assert not found - set(KNOWN) - set(NEWER), (
        f"vLLM {vllm.__version__} has models with an attention that nobody has judged: read what "
        "they give their layers, let `refused_models` refuse them, and say here how"
    )
    assert not set(KNOWN) - found, "models that are gone: take them from this list"


@pytest.mark.parametrize("kind", ["inkling", "minimax_m3", "hrm_text", "step1", "iquest_loopcoder"])
def test_a_name_is_of_every_class_of_its_file(kind: str) -> None:
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    classes = [name for name, (file, _) in _TEXT_GENERATION_MODELS.items() if kind in file]
    assert classes
    assert set(classes) <= set(refused_models.ALWAYS)
