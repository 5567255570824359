"""The look-ahead: the text of a long prompt runs before it, so that its question is known early.

Prompts put the question after the video. When the first chunks are cut, only the template has been
seen, and no score can tell which frame will matter. The engine knows the whole prompt, though: its
last text tokens run alone as an internal request, the worker keeps their queries as the first
content of the probe bank, and the real request starts then.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from vllm_budgetkv.start.request_rules import own

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.core.sched.output import NewRequestData


class LookaheadParams(SamplingParams):
    """How a look-ahead samples, and for whom it runs.

    They reach the workers with the request. No client can send them: what a front end passes on
    becomes vLLM's own class.
    """

    parent_id: str = ""
    parent_prompt_tokens: int = 0


def parent_of(new: NewRequestData) -> str | None:
    """Id of the request that a new one runs ahead of; None for a client's request."""
    params = new.sampling_params
    return params.parent_id if isinstance(params, LookaheadParams) else None


@dataclass
class Lookaheads:
    """The internal requests of one engine, known by this table and never by the text of an id.

    Args:
        parents: the client's request that each runs ahead of, by the id of the look-ahead; from
            its arrival until its last output is out of the way.
        held: the look-ahead's id, by the id of each client's request that is held back for it.
        spared: ids of clients' requests that need none, as long as host memory keeps their prompt.
        late: the look-ahead's id, by the id of each request that was spared and needs one after
            all: it waits in vLLM's queue.
    """

    parents: dict[str, Request] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    spared: set[str] = field(default_factory=set)
    late: dict[str, str] = field(default_factory=dict)
    _lost: dict[str, Request] = field(default_factory=dict, init=False)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.parents

    def __iter__(self) -> Iterator[str]:
        """Ids of those that a client's request is held back for."""
        return iter(self.held.values())

    def hold(self, parent: Request, ahead: Request) -> None:
        """Note that `parent` waits until `ahead` has ended."""
        self.parents[ahead.request_id] = parent
        self.held[parent.request_id] = ahead.request_id

    def release(self, ahead_id: str) -> Request | None:
        """The request that was held back for a look-ahead which ended; None if it was cancelled."""
        parent = self.parents.get(ahead_id)
        if parent is None:
            return None
        if self.late.get(parent.request_id) == ahead_id:
            self.forget_spared(parent.request_id)
        if self.held.get(parent.request_id) != ahead_id:
            return None
        del self.held[parent.request_id]
        return parent

    def cancel(self, parent_id: str) -> tuple[Request, str] | None:
        """A held request that is held no more, and its look-ahead's id; None for any other."""
        ahead_id = self.held.pop(parent_id, None)
        return None if ahead_id is None else (self.parents[ahead_id], ahead_id)

    # --- requests that need none -----------------------------------------------------------------

    def spare(self, request_id: str) -> None:
        """Note that nothing runs ahead of a request, since it will read its question in time."""
        self.spared.add(request_id)

    def may_begin(self, request: Request, *, is_kept: bool) -> bool:
        """Whether a request begins now; one that was spared must have a look-ahead if not.

        Args:
            request: a client's, in vLLM's queue.
            is_kept: whether host memory keeps so much of its prompt that it needs none.
        """
        request_id = request.request_id
        if request_id not in self.spared or (is_kept and request_id not in self.late):
            return True
        if request_id not in self.late:
            self._lost[request_id] = request
        return False

    def take_lost(self) -> list[Request]:
        """The spared requests that `may_begin` held since the last call."""
        lost, self._lost = self._lost, {}
        return list(lost.values())

    def run_late(self, parent: Request, ahead: Request) -> None:
        """Note that `parent`, in vLLM's queue, waits there until `ahead` has ended."""
        self.parents[ahead.request_id] = parent
        self.late[parent.request_id] = ahead.request_id

    def forget_spared(self, request_id: str) -> str | None:
        """Know nothing more of a request that was spared. Returns its late look-ahead's id."""
        self.spared.discard(request_id)
        self._lost.pop(request_id, None)
        return self.late.pop(request_id, None)

    def forget_gone(self, alive: Container[str]) -> None:
        """Drop the look-aheads that are not among the requests that are `alive`."""
        for ahead_id in [name for name in self.parents if name not in alive]:
            del self.parents[ahead_id]


def text_tokens(
    prompt_token_ids: Sequence[int],
    features: Sequence[MultiModalFeatureSpec],
    limit_tokens: int,
    enough_tokens: int,
) -> list[int]:
    """The last prompt tokens outside every multimodal item, in order.

    Args:
        prompt_token_ids: of the whole prompt.
        features: its multimodal items.
        limit_tokens: most tokens.
        enough_tokens: text in front of an item is left out once so many stand behind it.
    """
    text: list[int] = []
    stop = len(prompt_token_ids)
    for feature in sorted(features, key=lambda f: f.mm_position.offset, reverse=True):
        item = feature.mm_position
        text[:0] = prompt_token_ids[item.offset + item.length : stop]
        stop = item.offset
        if len(text) >= min(enough_tokens, limit_tokens):
            break
    else:
        text[:0] = prompt_token_ids[:stop]
    return text[-limit_tokens:]


def make_lookahead(parent: Request, limit_tokens: int, enough_tokens: int) -> Request | None:
    """The internal request of `parent`; None when the prompt has no text to run.

    Args:
        parent: a client's request.
        limit_tokens, enough_tokens: see `text_tokens`.
    """
    if parent.prompt_token_ids is None or parent.resumable:
        return None
    prompt = text_tokens(parent.prompt_token_ids, parent.mm_features, limit_tokens, enough_tokens)
    if not prompt:
        return None
    asked = parent.sampling_params
    request = Request(
        # no client can guess it, so none has it or will have it
        request_id=f"kv-lookahead-{uuid.uuid4().hex}",
        client_index=parent.client_index,
        prompt_token_ids=prompt,
        sampling_params=LookaheadParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            # it asks the cache as its parent will
            extra_args=own(None if asked is None else asked.extra_args),
            parent_id=parent.request_id,
            parent_prompt_tokens=parent.num_prompt_tokens,
        ),
        pooling_params=None,
        arrival_time=parent.arrival_time,
        lora_request=parent.lora_request,
        priority=parent.priority,
    )
    # its blocks hold other positions than the parent's, so they are no prefix of anything
    request.skip_reading_prefix_cache = True
    return request
