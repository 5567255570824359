"""What a configuration says of each layer, and of the elements of a value, by whatever name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# models with values of fewer elements than keys, which pages store with zeros behind them; others
# were not tried
PADDED = {"MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM"}
# what vLLM's class reads of `hybrid_layer_pattern`; any other number means full attention
WINDOWED = 1


def layer_types(text: Any) -> list[str]:
    """Kinds of layers in their order, in the words of Transformers; empty if none is named.

    Args:
        text: configuration of the language model.
    """
    pattern = getattr(text, "hybrid_layer_pattern", None)
    if pattern is None:
        return list(getattr(text, "layer_types", None) or ())
    return ["sliding_attention" if kind == WINDOWED else "full_attention" for kind in pattern]


def head_sizes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Elements of a key and of a value, by the kind of the layer.

    Args:
        model: of `PADDED`; of others it is known only once they are loaded.
    """
    text = model.hf_text_config
    size, window_size = model.get_head_size(), getattr(text, "swa_head_dim", None)
    sizes = {"full_attention": (size, getattr(text, "v_head_dim", None) or size)}
    if window_size is not None:
        window_value = getattr(text, "swa_v_head_dim", None) or window_size
        sizes["sliding_attention"] = (window_size, window_value)
    return sizes


def value_size(model: ModelConfig) -> int:
    """Elements of a value in layers with full attention, as vLLM stores it without us."""
    if not PADDED.intersection(model.architectures):
        return model.get_head_size()
    return head_sizes(model)["full_attention"][1]


def pads_values(model: ModelConfig) -> bool:
    """Whether some layers have values of fewer elements than keys, in a way that is served."""
    if not PADDED.intersection(model.architectures):
        return False
    return any(value < key for key, value in head_sizes(model).values())
