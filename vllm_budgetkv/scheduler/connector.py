"""The scheduler's half of host memory, as a KV connector: what a prompt finds there, and its place.

Of vLLM's `KVConnectorBase_V1` this is the half that the engine core calls. The worker's half would
load before a forward what it then holds, and a quota holds none of that: here the cache itself
reads host memory, a chunk of a layer at a time (`cache/replay.py`), told by the metadata of a step.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, hash_block_tokens
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from vllm_budgetkv.arithmetic.frame_groups import whole_items
from vllm_budgetkv.scheduler.prompts import (
    Found,
    HostPrompts,
    ItemEnd,
    PromptKeys,
    most_reused_tokens,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Self

    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

    from vllm_budgetkv.arithmetic.host_blocks import HostPlace
    from vllm_budgetkv.arithmetic.terms import Terms


@dataclass
class HostMetadata(KVConnectorMetadata):
    """What the worker is told with a step.

    Args:
        places: of the requests that are admitted in it, by id, in the order of their admission.
    """

    places: dict[str, HostPlace] = field(default_factory=dict)


@dataclass(frozen=True)
class ReuseRules:
    """What the scheduler knows of requests.

    Args:
        terms_of: what a request is held to.
        looks_ahead: whether its own text runs ahead of it, which chooses what it takes over, or
            would if host memory kept less of it.
        may_begin: whether it begins, if it finds so many tokens.
        stop_behind: where its chunk behind so many tokens ends.
        probe_tokens: last tokens of a prompt that ask the cache, so that they are computed anew.
    """

    terms_of: Callable[[Request], Terms]
    looks_ahead: Callable[[Request], bool]
    may_begin: Callable[[Request, int], bool]
    stop_behind: Callable[[Request, int], int]
    probe_tokens: int


class HostConnector(KVConnectorBase_V1):
    """Keeps account of the prompts in host memory.

    Args:
        args, kwargs: of the base.
        prompts: what host memory keeps.
        rules: see there.
    """

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, *args: Any, prompts: HostPrompts, rules: ReuseRules, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prompts = prompts
        self._rules = rules
        algorithm = self._vllm_config.cache_config.prefix_caching_hash_algo
        self._hash = get_hash_fn_by_name(algorithm)
        self._admitted: dict[str, HostPlace] = {}
        self._keys: dict[str, PromptKeys] = {}
        self._found_tokens: dict[str, int] = {}

    @classmethod
    def of(cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, **own: Any) -> Self:
        """The connector of an engine. `own`: keywords of the class."""
        # the base asks for a section that would make vLLM load a connector in the workers too
        config = copy(vllm_config)
        config.kv_transfer_config = KVTransferConfig(
            kv_connector=cls.__name__, kv_role="kv_consumer"
        )
        return cls(config, KVConnectorRole.SCHEDULER, kv_cache_config, **own)

    @property
    def use(self) -> dict[str, int]:
        """Blocks of host memory, by state."""
        return self._prompts.blocks.use

    # --- admission -------------------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        request_id = request.request_id
        if self._prompts.waits(request_id):
            return None, False
        # one that was preempted holds nothing while it waits, but may find what it wrote
        self._prompts.leave(request_id)
        if num_computed_tokens or not self._reuses_for(request):
            return 0, False
        found_tokens = self._find(request)
        if found_tokens is None or not self._rules.may_begin(request, found_tokens):
            return None, False
        return found_tokens, False

    def keeps_now(self, request: Request) -> int:
        """Tokens of a prompt that one which arrives would take over, if it were admitted now."""
        # vLLM lets one that asks for logprobs of its prompt begin with nothing
        if request.skip_reading_prefix_cache or not self._reuses_for(request):
            return 0
        found_tokens = self._find(request)
        # it waits for nobody yet, and may never be admitted
        self._prompts.leave(request.request_id)
        del self._keys[request.request_id]
        return found_tokens or 0

    def _find(self, request: Request) -> int | None:
        """Tokens of a prompt that are kept, and for the rest of which there is room; else None."""
        keys, most_tokens = self._keys_of(request), self._most_tokens(request)
        found = self._prompts.find(request.request_id, keys, most_tokens)
        if found is None:
            return None
        has_room = self._prompts.has_room(request.num_prompt_tokens, found)
        return found.num_tokens if has_room else 0

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        if not self._is_kept(request):
            return
        # a preempted request may find more: what it wrote itself, behind its own chunks
        first = self._found_tokens.setdefault(request.request_id, num_external_tokens)
        keys, found = PromptKeys(), Found()
        if self._reuses_for(request):
            keys = self._keys_of(request)
        if num_external_tokens:
            again = self._prompts.find(request.request_id, keys, num_external_tokens)
            assert again is not None
            assert again.num_tokens == num_external_tokens, "what was found is there no more"
            found = again
        place = self._prompts.admit(
            request.request_id,
            request.num_prompt_tokens,
            keys,
            found,
            list(self._stops(request, num_external_tokens)),
        )
        if place is not None:
            self._admitted[request.request_id] = replace(place, found_tokens=first)

    def _reuses_for(self, request: Request) -> bool:
        reuses = self._rules.terms_of(request).reuses and self._is_kept(request)
        return reuses and self._rules.looks_ahead(request)

    def _is_kept(self, request: Request) -> bool:
        """Whether host memory keeps such a prompt: one that does not fit and may recall."""
        quota = self._rules.terms_of(request).quota
        recalls = quota.recall is not None
        return recalls and quota.compresses_prompt(request.num_prompt_tokens)

    def _most_tokens(self, request: Request) -> int:
        return most_reused_tokens(
            self._rules.terms_of(request).quota,
            request.num_prompt_tokens,
            probe_tokens=self._rules.probe_tokens,
            end_of_items=end_of_items(request.mm_features),
        )

    def _stops(self, request: Request, num_tokens: int) -> Iterator[int]:
        """Where the chunks of a prompt's first tokens end."""
        stop_tokens = 0
        while (stop_tokens := self._rules.stop_behind(request, stop_tokens)) <= num_tokens:
            yield stop_tokens

    def _keys_of(self, request: Request) -> PromptKeys:
        if (known := self._keys.get(request.request_id)) is not None:
            return known
        # the chain goes on into the output, which host memory does not keep
        hashes = request.block_hashes[: request.num_prompt_tokens // self._prompts.page_tokens]
        # what a prompt's keys and values are hangs on what was kept in front of them, too
        kind = self._rules.terms_of(request).kind
        ends = [ItemEnd(stop, (kind, key)) for stop, key in self._item_ends(request)]
        keys = PromptKeys([(kind, key) for key in hashes], ends)
        self._keys[request.request_id] = keys
        return keys

    def _item_ends(self, request: Request) -> Iterator[ItemEnd]:
        page_tokens = self._prompts.page_tokens
        stops = sorted({_stop_of(feature) for feature in whole_items(request.mm_features)})
        for stop_tokens in stops:
            index, num_tokens = divmod(stop_tokens, page_tokens)
            if not num_tokens or stop_tokens > request.num_prompt_tokens:
                continue
            start_tokens = index * page_tokens
            extra_keys, _ = generate_block_hash_extra_keys(request, start_tokens, stop_tokens, 0)
            parent = request.block_hashes[index - 1] if index else None
            tokens = request.all_token_ids[start_tokens:stop_tokens]
            yield ItemEnd(stop_tokens, hash_block_tokens(self._hash, parent, tokens, extra_keys))

    # --- every step ------------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> HostMetadata:
        seen_tokens = {
            new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs
        }
        cached = scheduler_output.scheduled_cached_reqs
        seen_tokens.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            self._prompts.wrote(request_id, seen_tokens[request_id] + num_tokens)
        admitted, self._admitted = self._admitted, {}
        return HostMetadata(
            {name: place for name, place in admitted.items() if name in seen_tokens}
        )

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._prompts.leave(request.request_id)
        self._keys.pop(request.request_id, None)
        self._found_tokens.pop(request.request_id, None)
        return False, None

    def reset_cache(self) -> bool:
        self._prompts.forget_all()
        return True

    # --- the worker's half, which the cache is ---------------------------------------------------

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        raise NotImplementedError(_NO_WORKER)

    def wait_for_layer_load(self, layer_name: str) -> None:
        raise NotImplementedError(_NO_WORKER)

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        raise NotImplementedError(_NO_WORKER)

    def wait_for_save(self) -> None:
        raise NotImplementedError(_NO_WORKER)


_NO_WORKER = "host memory is read and written by the cache, inside its layers"


def end_of_items(features: Sequence[Any]) -> int:
    """Tokens of a prompt up to the end of its last item; 0 if there is none."""
    return max((_stop_of(feature) for feature in features), default=0)


def _stop_of(feature: Any) -> int:
    """Position behind the last token of an item."""
    return feature.mm_position.offset + feature.mm_position.length
