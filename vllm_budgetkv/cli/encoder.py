"""What pictures and videos take beside the KV cache: the encoder cache, and the tower's peak."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.arithmetic.frame_groups import bounded_encoder_tokens
from vllm_budgetkv.cache.vision import UNREADABLE
from vllm_budgetkv.cli.activations import FORMULA, layer_elements
from vllm_budgetkv.cli.figures import Figure, Origin
from vllm_budgetkv.start.frame_groups import VIDEO, frames_of, reasons_against, small_video

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
        whole_tokens: what the encoder cache would keep if it kept whole videos; None where it does.
    """

    item_tokens: Mapping[str, int]
    cache_tokens: int
    cache: Figure | None
    tower: Figure | None
    unknown: tuple[str, ...] = ()
    whole_tokens: int | None = None


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
    in_groups = _computes_in_groups(engine, budget)
    cache_tokens = _bounded_tokens(engine, budget) if in_groups else budget.encoder_cache_size
    embedding_bytes = _embedding_bytes(engine)
    tower, unknown = _tower_peak(engine, _tower_batch(budget, cache_tokens, in_groups))
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
        whole_tokens=budget.encoder_cache_size if in_groups else None,
    )


def _computes_in_groups(engine: PlannedEngine, budget: Any) -> bool:
    """Whether videos are computed in groups of frames, if the model's tower proves right."""
    if VIDEO not in budget.mm_max_toks_per_item or reasons_against(engine):
        return False
    try:
        video = small_video(budget.processor, engine.model_config.max_model_len)
    except (AssertionError, *UNREADABLE):
        # the start tells
        return False
    return frames_of(video) is not None


def _bounded_tokens(engine: PlannedEngine, budget: Any) -> int:
    others = [n for kind, n in budget.mm_max_toks_per_item.items() if kind != VIDEO]
    batch_tokens = engine.scheduler_config.max_num_batched_tokens
    return bounded_encoder_tokens(batch_tokens, max(others, default=0))


def _tower_batch(budget: Any, cache_tokens: int, in_groups: bool) -> tuple[str, int, int]:
    """Kind, number and tokens of what the tower is tried with at start."""
    kinds = {k: n for k, n in budget.mm_max_toks_per_item.items() if k != VIDEO or not in_groups}
    if not kinds:
        return "frames", 1, cache_tokens
    kind = max(kinds, key=lambda k: (kinds[k], k))
    num_items = budget.mm_max_items_per_batch[kind]
    if in_groups:
        num_items = max(1, min(num_items, cache_tokens // max(1, kinds[kind])))
        if num_items * kinds[kind] < cache_tokens:
            return "frames", 1, cache_tokens
    return f"the largest {kind}", num_items, kinds[kind]


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


def _tower_peak(
    engine: PlannedEngine, batch: tuple[str, int, int]
) -> tuple[Figure | None, tuple[str, ...]]:
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
    kind, num_items, item_tokens = batch
    num_patches = num_items * item_tokens * merge**2
    patch_bytes = layer_elements(width, mlp_width) * engine.model_config.dtype.itemsize
    source = (
        f"{num_items} x {kind}, {num_patches:,} patches x {FORMULA}, h {width:,}, i {mlp_width:,}"
    )
    return Figure(num_patches * patch_bytes, Origin.ESTIMATE, source), ()
