"""The worker's side of frame groups: the proof, the positions of whole videos, the memory trial."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget

from vllm_budgetkv.arithmetic.frame_groups import (
    GROUP_TOKENS,
    bounded_encoder_tokens,
    group_stops,
    whole_items,
)
from vllm_budgetkv.cache.vision import UNREADABLE
from vllm_budgetkv.start import upstream
from vllm_budgetkv.start.frame_groups import (
    PIXELS,
    VIDEO,
    frames_of,
    reasons_to_keep_whole,
    small_video,
)
from vllm_budgetkv.worker.frame_proof import FrameProof, with_frames

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalKwargsItem

    from vllm_budgetkv.start.frame_groups import Frames

logger = init_logger("vllm.plugins.budgetkv")


@dataclass(frozen=True)
class VideoEncoder:
    """What the encoder of a model takes, whose videos are computed in groups of frames.

    Args:
        tokens: embeddings that it makes in a step and keeps.
        budget: vLLM's counts, until they are bounded to these.
        group: some frames, as the model's processor makes them.
        group_tokens: embeddings of these.
    """

    tokens: int
    budget: MultiModalBudget
    group: MultiModalKwargsItem
    group_tokens: int

    @classmethod
    def of(cls, runner: Any, vllm_config: VllmConfig) -> VideoEncoder | None:
        """None for a model without videos, and where each must be computed as a whole.

        Args:
            runner: vLLM's model runner, with its model loaded.
            vllm_config: its configuration.
        """
        if not runner.supports_mm_inputs:
            return None
        budget = getattr(runner, "mm_budget", None)
        if budget is None:
            budget = MultiModalBudget(vllm_config, MULTIMODAL_REGISTRY, enable_cache=False)
        if VIDEO not in budget.mm_max_toks_per_item:
            return None
        try:
            video, frames = _proven(runner, vllm_config, budget)
        except (AssertionError, *UNREADABLE) as error:
            logger.info("budgetkv: each video is computed as a whole: %s", error)
            return None
        others = [n for kind, n in budget.mm_max_toks_per_item.items() if kind != VIDEO]
        batch_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        tokens = bounded_encoder_tokens(batch_tokens, max(others, default=0))
        logger.info(
            "budgetkv: videos are computed in groups of frames as chunks need them, the encoder "
            "takes at most %d tokens at once",
            tokens,
        )
        _keep_positions(runner.get_model())
        part_outputs(runner.get_model())
        num_frames = group_stops(GROUP_TOKENS, frames.frame_tokens)[0]
        pixels = video[PIXELS].data
        rows = pixels.new_zeros(num_frames * frames.frame_rows, *pixels.shape[1:])
        group = with_frames(video, frames, rows)
        return cls(tokens, budget, group, num_frames * frames.frame_tokens)

    @contextmanager
    def tried(self, is_v2: bool) -> Iterator[None]:
        """Inside, vLLM's memory trial runs the tower on what the encoder takes at most."""
        self._bound()
        if not is_v2:
            # its runner has this one
            yield
            return
        from vllm.v1.worker.gpu import model_runner

        with upstream.replaced_in(model_runner, "MultiModalBudget", self._given):
            yield

    def _given(self, original: Any, *args: Any, **kwargs: Any) -> MultiModalBudget:
        return self.budget

    def _bound(self) -> None:
        """Mutates the counts: the largest other items fill the encoder, or groups of frames do."""
        budget = self.budget
        budget.encoder_compute_budget = budget.encoder_cache_size = self.tokens
        num_groups = max(1, self.tokens // self.group_tokens)
        others = {kind: n for kind, n in budget.mm_max_toks_per_item.items() if kind != VIDEO}
        if others:
            largest = max(others, key=lambda kind: (others[kind], kind))
            most_items = self.tokens // max(1, others[largest])
            num_items = max(1, min(most_items, budget.mm_max_items_per_batch[largest]))
            if num_items * others[largest] >= num_groups * self.group_tokens:
                budget.mm_max_toks_per_item = {largest: others[largest]}
                budget.mm_max_items_per_batch = {largest: num_items}
                return
        budget.mm_max_toks_per_item = {VIDEO: self.group_tokens}
        budget.mm_max_items_per_batch = {VIDEO: num_groups}

        def groups(original: Any, *args: Any, **kwargs: Any) -> list[tuple[str, Any]]:
            return [(VIDEO, self.group)] * num_groups

        upstream.replace_in(budget, "MultiModalBudget.get_dummy_encoder_profile_inputs", groups)


def _proven(
    runner: Any, vllm_config: VllmConfig, budget: MultiModalBudget
) -> tuple[MultiModalKwargsItem, Frames]:
    """Fields and frames of a small video, on which the tower was tried.

    Raises:
        ValueError: says why videos must be computed as a whole. A processor or a tower that wants
            no small ones raises what it raises.
    """
    if reasons := reasons_to_keep_whole(vllm_config):
        raise ValueError(", ".join(reasons))
    video = small_video(budget.processor, vllm_config.model_config.max_model_len)
    frames = frames_of(video)
    if frames is None:
        raise ValueError("the model's processor tells no equal frames")
    proof = FrameProof(runner.get_model(), video.data, frames, runner.device)
    if problem := proof.problem():
        raise ValueError(problem)
    return video.data, frames


def part_outputs(model: Any) -> None:
    """Let no item's embeddings keep those of its batch alive. Mutates the model.

    Towers split one tensor into views, and the runners keep each until its own last token has run.
    """

    def outputs(original: Any, **fields: Any) -> list[torch.Tensor]:
        found = list(original(**fields))
        return [rows.clone() for rows in found] if len(found) > 1 else found

    upstream.replace_in(model, "SupportsMultiModal.embed_multimodal", outputs)


def _keep_positions(model: Any) -> None:
    """Let the model see whole videos where it counts positions (M-RoPE)."""
    if not hasattr(model, "get_mrope_input_positions"):
        return

    def positions(original: Any, input_tokens: Any, mm_features: Any, **others: Any) -> Any:
        return original(input_tokens, whole_items(mm_features), **others)

    upstream.replace_in(model, "SupportsMRoPE.get_mrope_input_positions", positions)
