"""What pictures and videos take beside the KV cache: the encoder cache, and the tower's peak."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.cli.activations import FORMULA, layer_elements
from vllm_budgetkv.cli.figures import Figure, Origin

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_budgetkv.cli.engine import PlannedEngine


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The encoder of a multimodal model.

    Args:
        item_tokens: most tokens of one picture, video, ... by kind; empty where they are unknown.
        cache_tokens: embeddings that the encoder cache keeps; 0 where they are unknown.
        cache: bytes of these embeddings; None where they are unknown.
        tower: bytes of the tower's activations at its peak; None where they are unknown.
        unknown: why something is.
    """

    item_tokens: Mapping[str, int]
    cache_tokens: int
    cache: Figure | None
    tower: Figure | None
    unknown: tuple[str, ...] = ()


def encoder_of(engine: PlannedEngine) -> Encoder | None:
    """What the encoder takes; None for a model, or a `--language-model-only` start, without one."""
    if not engine.model_config.supports_multimodal_inputs:
        return None
    try:
        budget = _vllm_budget(engine)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        why = (f"encoder cache and tower follow from the model's processor: {reason}",)
        return Encoder(item_tokens={}, cache_tokens=0, cache=None, tower=None, unknown=why)
    if not budget.mm_max_toks_per_item:
        return Encoder(item_tokens={}, cache_tokens=0, cache=None, tower=None)
    cache_tokens = budget.encoder_cache_size
    embedding_bytes = _embedding_bytes(engine)
    tower, unknown = _tower_peak(engine, budget)
    return Encoder(
        item_tokens=dict(sorted(budget.mm_max_toks_per_item.items())),
        cache_tokens=cache_tokens,
        cache=Figure(
            cache_tokens * embedding_bytes,
            Origin.COUNTED,
            f"{cache_tokens:,} embeddings of {embedding_bytes:,} bytes",
        ),
        tower=tower,
        unknown=unknown,
    )


def _vllm_budget(engine: PlannedEngine) -> Any:
    """vLLM's own count; without a cache of inputs it reads the model and the scheduler alone."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    parts = SimpleNamespace(
        model_config=engine.model_config, scheduler_config=engine.scheduler_config
    )
    return MultiModalBudget(parts, MULTIMODAL_REGISTRY, enable_cache=False)


def _embedding_bytes(engine: PlannedEngine) -> int:
    """Bytes of what the encoder makes of a token.

    DeepStack models (Qwen3-VL) hand features of some of the tower's layers on beside the last.
    """
    model = engine.model_config
    vision = getattr(model.hf_config, "vision_config", None)
    num_features = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return num_features * model.get_inputs_embeds_size() * model.dtype.itemsize


def _tower_peak(engine: PlannedEngine, budget: Any) -> tuple[Figure | None, tuple[str, ...]]:
    """Activations of the tower for the batch that vLLM tries at start, and why they are unknown."""
    vision = getattr(engine.model_config.hf_config, "vision_config", None)
    names = ("hidden_size", "intermediate_size", "spatial_merge_size")
    found = [getattr(vision, name, None) for name in names]
    if not all(isinstance(value, int) for value in found):
        return None, (
            "the tower's peak: its configuration does not tell "
            f"{', '.join(n for n, v in zip(names, found, strict=True) if v is None)}",
        )
    width, mlp_width, merge = (int(value or 0) for value in found)
    kind = budget.get_modality_with_max_tokens()
    num_items, item_tokens = budget.mm_max_items_per_batch[kind], budget.mm_max_toks_per_item[kind]
    num_patches = num_items * item_tokens * merge**2
    patch_bytes = layer_elements(width, mlp_width) * engine.model_config.dtype.itemsize
    source = (
        f"{num_items} x the largest {kind}, {num_patches:,} patches x {FORMULA}, "
        f"h {width:,}, i {mlp_width:,}"
    )
    return Figure(num_patches * patch_bytes, Origin.ESTIMATE, source), ()
