"""vLLM's engine core without a model: our scheduler, its manager and pool, and made-up tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

import vllm_budgetkv
from vllm_budgetkv.scheduler.answers import Told
from vllm_budgetkv.scheduler.frame_groups import EncoderRoom
from vllm_budgetkv.scheduler.scheduler import BudgetScheduler
from vllm_budgetkv.scheduler.spec import QuotaSpec
from vllm_budgetkv.start.activation import quota_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_budgetkv.arithmetic.recalled import Recalled

BLOCK_TOKENS = 8
BUDGET = {"page_quota": 12, "chunk_tokens": 24, "decode_interval_tokens": 8, "window_tokens": 8}


def configure(model: Path, policy: str = "window", **changes: Any) -> VllmConfig:
    """The configuration of an engine; `changes` are of its arguments or, as `budget`, of ours."""
    vllm_budgetkv.register()
    arguments = {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 4096,
        "block_size": BLOCK_TOKENS,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        **changes,
    }
    budget = {"policy": policy, **BUDGET, **arguments.pop("budget", {})}
    arguments["additional_config"] = {"budgetkv": budget}
    return EngineArgs(**arguments).create_engine_config()


def image(offset: int, length: int, name: str) -> MultiModalFeatureSpec:
    place = PlaceholderRange(offset=offset, length=length)
    return MultiModalFeatureSpec(
        data=None, modality="image", identifier=name, mm_position=place, mm_hash=name
    )


def state_group(vllm_config: VllmConfig, name: str) -> KVCacheGroupSpec:
    """A group of layers with recurrent state, in the mode of the configuration."""
    cache = vllm_config.cache_config
    spec = MambaSpec(
        block_size=BLOCK_TOKENS if cache.mamba_cache_mode == "align" else 4096,
        shapes=((2, 4),),
        dtypes=(vllm_config.model_config.dtype,),
        mamba_cache_mode=cache.mamba_cache_mode,
    )
    return KVCacheGroupSpec([name], spec)


class Core:
    """A scheduler whose requests get token `number` as their `number`-th output.

    Args:
        vllm_config: of `configure`.
        pool_blocks: blocks of the pool; one of them is vLLM's null block.
        encoder_embeds: embeddings that the encoder makes in a step and that its cache holds.
        log_stats: whether metrics are made.
        state_groups: groups of layers with recurrent state beside ours.
        in_groups: whether workers have found that videos may be computed in groups of frames.

    Attributes:
        tells: what a worker tells of requests with every step, by id.
        said: what the answer of each request that ended says.
        travels: what each of its outputs travels with.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        *,
        pool_blocks: int = 200,
        encoder_embeds: int = 0,
        log_stats: bool = False,
        state_groups: int = 0,
        in_groups: bool = False,
    ) -> None:
        init_none_hash(sha256)
        vllm_config.cache_config.num_gpu_blocks = pool_blocks
        layer = FullAttentionSpec(
            block_size=BLOCK_TOKENS,
            num_kv_heads=2,
            head_size=32,
            dtype=vllm_config.model_config.dtype,
        )
        spec = QuotaSpec.of(layer, quota_of(vllm_config))
        # ours are not the first: nobody may count on that
        groups = [state_group(vllm_config, f"state{i}") for i in range(state_groups)]
        groups.append(KVCacheGroupSpec(["layer0", "layer1"], spec))
        self.scheduler = BudgetScheduler(
            vllm_config,
            KVCacheConfig(pool_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            StructuredOutputManager(vllm_config),
            # as vLLM does: a multiple of the blocks of all groups
            block_size=math.lcm(*(group.kv_cache_spec.block_size for group in groups)),
            log_stats=log_stats,
        )
        self.in_groups = in_groups
        if encoder_embeds:
            self._limit_encoder(encoder_embeds)
        self.ends: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.cached_tokens: dict[str, int] = {}
        self.said: dict[str, dict[str, Any] | None] = {}
        self.tells: dict[str, dict[str, Any]] = {}
        self.recalled: Recalled | None = None
        self.travels: dict[str, list[dict[str, Any] | None]] = {}
        self.outputs: list[SchedulerOutput] = []

    def _limit_encoder(self, embeds: int) -> None:
        scheduler = self.scheduler
        scheduler.max_num_encoder_input_tokens = embeds
        scheduler.encoder_cache_manager = EncoderCacheManager(embeds)
        scheduler.encoder_limits = replace(scheduler.encoder_limits, embeds=embeds)
        scheduler.encoder_room = EncoderRoom(embeds, in_groups=self.in_groups)

    def add(
        self,
        request_id: str,
        prompt_tokens: int,
        output_tokens: int = 4,
        images: Sequence[MultiModalFeatureSpec] = (),
    ) -> Request:
        request = self.make(request_id, [*range(prompt_tokens)], images, output_tokens)
        self.scheduler.add_request(request)
        return request

    def make(
        self,
        request_id: str,
        prompt: Sequence[int],
        images: Sequence[MultiModalFeatureSpec] = (),
        output_tokens: int = 4,
        salt: str | None = None,
    ) -> Request:
        """A request that has not been added."""
        return Request(
            request_id=request_id,
            prompt_token_ids=[*prompt],
            sampling_params=SamplingParams(max_tokens=output_tokens, ignore_eos=True),
            pooling_params=None,
            mm_features=list(images),
            cache_salt=salt,
            block_hasher=get_request_block_hasher(BLOCK_TOKENS, sha256),
        )

    def step(self) -> SchedulerOutput:
        """Schedule, note where every chunk ends, and give the requests that got so far a token."""
        scheduled = self.scheduler.schedule()
        self.give(scheduled)
        return scheduled

    def give(self, scheduled: SchedulerOutput) -> None:
        """What a worker gives back of a step."""
        scheduler = self.scheduler
        self.outputs.append(scheduled)
        ids, sampled = [*scheduled.num_scheduled_tokens], []
        for request_id in ids:
            request = scheduler.requests.get(request_id)
            if request is None:  # it was aborted meanwhile
                sampled.append([])
                continue
            self.ends.setdefault(request_id, []).append(request.num_computed_tokens)
            sampled.append([] if request.is_prefill_chunk else [request.num_output_tokens])
        index = {request_id: row for row, request_id in enumerate(ids)}
        ran = ModelRunnerOutput(req_ids=ids, req_id_to_index=index, sampled_token_ids=sampled)
        if told := {name: self.tells[name] for name in ids if name in self.tells}:
            evicted = {name: {"static": 3, "dynamic": 4} for name in told}
            meta = Told(told, evicted, self.recalled)
            self.recalled = None
            ran.kv_connector_output = KVConnectorOutput(kv_connector_worker_meta=meta)
        for of_client in scheduler.update_from_output(scheduled, ran).values():
            for output in of_client.outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
                self.travels.setdefault(output.request_id, []).append(output.kv_transfer_params)
                if output.prefill_stats is not None:
                    self.cached_tokens[output.request_id] = output.prefill_stats.num_cached_tokens
                if output.finish_reason is not None:
                    self.ended[output.request_id] = str(output.finish_reason)
                    self.said[output.request_id] = output.kv_transfer_params

    def run(self, most_steps: int = 2000) -> None:
        """Step until every request has ended.

        Raises:
            AssertionError: some wait for ever.
        """
        for _ in range(most_steps):
            if not self.scheduler.has_unfinished_requests():
                return
            self.step()
        raise AssertionError(f"unfinished: {sorted(self.scheduler.requests)}")
