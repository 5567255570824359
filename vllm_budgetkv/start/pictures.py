"""Pictures whose tokens attend to each other both ways: which models, which tokens, how long.

vLLM calls them `mm_prefix`: `(causal and window) or both in one picture`. Each is one run of
tokens with an embedding; a run longer than the model's sliding window attends causally, in vLLM as
here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_budgetkv.start.engine_config import step_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

    from vllm.config import ModelConfig, VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.request import Request

    from vllm_budgetkv.arithmetic.pictures import Range
    from vllm_budgetkv.arithmetic.quota import Quota
    from vllm_budgetkv.start.config import BudgetConfig
    from vllm_budgetkv.start.engine_config import EngineConfig

# models with such pictures; others were not tried
BOTH_WAYS = {
    "BagelForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
}

# where a configuration says how many tokens any picture has, or a side of it
PICTURE_TOKENS = ("mm_tokens_per_image", "num_image_tokens")
PICTURE_SIDE = "vit_max_num_patch_per_side"


def attend_both_ways(model: ModelConfig) -> bool:
    """Whether tokens of pictures attend to later ones, in a way that is served."""
    return model.is_mm_prefix_lm and bool(BOTH_WAYS.intersection(model.architectures))


@dataclass(frozen=True)
class Room:
    """What a step computes of a request at most.

    Args:
        tokens: of the prompt.
        flag: the option that sets them.
        others: tokens that the option keeps for other requests beside them.
    """

    tokens: int
    flag: str
    others: int = 0

    def wish_for(self, tokens: int) -> str:
        """What the option must be to have room for so many."""
        or_else = " (or a lower --max-num-seqs)" if self.others else ""
        return f"{self.flag} of at least {tokens + self.others}{or_else}"

    @classmethod
    def of(cls, engine: EngineConfig, default: Quota) -> Self:
        """That of any request, whatever its quota.

        Args:
            engine: its configuration.
            default: quota of a request that asks for none.
        """
        others = engine.scheduler_config.max_num_seqs - 1
        threshold = engine.scheduler_config.long_prefill_token_threshold
        tokens, flag = step_tokens(engine)
        found = cls(tokens - others, flag, others)
        if default.compresses:
            # which is the threshold then
            return cls.of_chunks(default, found)
        if 0 < threshold < found.tokens:
            return cls(threshold, "--long-prefill-token-threshold")
        return found

    @classmethod
    def of_chunks(cls, quota: Quota, step: Self) -> Self:
        """That of a request under a quota, in a step with so much room."""
        if not quota.compresses or quota.chunk_tokens > step.tokens:
            return step
        return cls(quota.chunk_tokens, "--kv-chunk-tokens")


@dataclass(frozen=True)
class Pictures:
    """The pictures of prompts that no chunk may cut, and how long they may be.

    Args:
        attend_both_ways: whether the model has such pictures; else there are none.
        window_tokens: of the model; a longer picture attends causally. None without a window.
        step: room for any request.
    """

    attend_both_ways: bool
    window_tokens: int | None
    step: Room

    @classmethod
    def of(cls, engine: EngineConfig, default: Quota) -> Self:
        """Those of an engine; `default` is the quota of a request that asks for none."""
        model = engine.model_config
        step = Room.of(engine, default)
        return cls(attend_both_ways(model), model.get_sliding_window(), step)

    def ahead(self, request: Request, start_tokens: int) -> list[Range]:
        """Those of the prompt of a request that has seen `start_tokens`; none behind its prompt."""
        return self.among(request.mm_features) if start_tokens < request.num_prompt_tokens else []

    def among(self, features: Sequence[MultiModalFeatureSpec]) -> list[Range]:
        """First position and the one behind the last of each picture of a prompt, in order."""
        if not self.attend_both_ways:
            return []
        found = [
            (first, last + 1)
            for feature in features
            if feature.modality != "audio"
            for first, last in feature.mm_position.extract_embeds_range()
        ]
        longest = self.window_tokens
        return sorted(each for each in found if longest is None or each[1] - each[0] <= longest)

    def trim(self, request: Request) -> None:
        """Let each item begin with its first embedding. Mutates `request`.

        Text in front of it is computed without it then, also by a request that has no room for it
        beside the item in front. Where that text is the end of this item, too, as in Gemma 3, it
        would be kept until the next has room, and others' would be for the same reason.
        """
        if self.attend_both_ways:
            request.mm_features = [_trimmed(feature) for feature in request.mm_features]

    def refusal(self, features: Sequence[MultiModalFeatureSpec], quota: Quota) -> str | None:
        """Why a prompt is refused; None if one chunk holds each of its pictures."""
        longest = max((stop - first for first, stop in self.among(features)), default=0)
        room = Room.of_chunks(quota, self.step)
        if longest <= room.tokens:
            return None
        return (
            f"a picture has {longest} tokens that attend to each other, but a step computes at "
            f"most {room.tokens} of a request: send smaller pictures, or ask a server with "
            f"{room.wish_for(longest)}"
        )


def _trimmed(feature: MultiModalFeatureSpec) -> MultiModalFeatureSpec:
    """An item that begins with its first embedding."""
    place = feature.mm_position
    if place.is_embed is None or not place.is_embed.any():
        return feature
    lead = int(place.is_embed.int().argmax())
    first, length = place.offset + lead, place.length - lead
    place = replace(place, offset=first, length=length, is_embed=place.is_embed[lead:])
    return replace(feature, mm_position=place)


def reasons(vllm_config: VllmConfig, config: BudgetConfig) -> Iterator[str]:
    """Why a model with such pictures is refused, each with the option to change."""
    model = vllm_config.model_config
    # beside windows the same is refused in any case
    if not attend_both_ways(model) or model.get_sliding_window() is not None:
        return
    if config.host_bytes:
        yield (
            "host memory was not tried with pictures that attend both ways: remove --kv-host-memory"
        )
    parallel = vllm_config.parallel_config
    for size, flag in (
        (parallel.tensor_parallel_size, "--tensor-parallel-size"),
        (parallel.pipeline_parallel_size, "--pipeline-parallel-size"),
    ):
        if size > 1:
            yield (
                "no model whose pictures attend both ways was tried on several devices: set "
                f"{flag} {size} to 1"
            )


def check(engine: EngineConfig, quota: Quota) -> None:
    """Refuse a model whose pictures no chunk holds, where its configuration says how long they are.

    Args:
        engine: its configuration.
        quota: of a request that asks for none.

    Raises:
        ValueError: with both numbers and the option to change.
    """
    longest, found = _picture_tokens(engine.model_config), Pictures.of(engine, quota)
    is_causal = found.window_tokens is not None and longest > found.window_tokens
    if not found.attend_both_ways or is_causal or longest <= found.step.tokens:
        return
    raise ValueError(
        f"a picture of the model has {longest} tokens that attend to each other, but a step "
        f"computes at most {found.step.tokens} of a request: use {found.step.wish_for(longest)}"
    )


def _picture_tokens(model: ModelConfig) -> int:
    """Tokens of any picture, by the configuration; 0 where it does not say it."""
    parts = (model.hf_config, model.hf_text_config)
    named = [getattr(part, name, None) or 0 for part in parts for name in PICTURE_TOKENS]
    side = getattr(model.hf_config, PICTURE_SIDE, None) or 0
    return max(*named, side**2)


def settle(vllm_config: VllmConfig) -> None:
    """Let our scheduler alone keep pictures whole. Mutates `vllm_config`.

    On a GPU vLLM asks for whole items: no chunk may then hold a picture in several parts that are
    longer than one, and 0.32 cuts an item that begins a chunk.
    """
    if attend_both_ways(vllm_config.model_config):
        vllm_config.scheduler_config.disable_chunked_mm_input = False
