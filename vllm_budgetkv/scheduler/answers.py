"""What an answer says of its request: the proof that its quota held, and what it cost.

It travels as `kv_transfer_params["budgetkv"]`, which vLLM takes from the scheduler to the body of a
response and to `RequestOutput`; beside it a message for the metrics, which the front end takes out.
What only reports never ends a request.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata

from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.arithmetic.recalled import Recalled
from vllm_budgetkv.metrics.message import REPORT, Growth, Message

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from vllm_budgetkv.arithmetic.terms import Terms


@dataclass
class Told(KVConnectorWorkerMetadata):
    """What a worker counted of requests, by id. One rank speaks for all: their quotas are the same.

    Args:
        fields: of their answers.
        evicted_tokens: by class of head, summed over the heads of the rank.
        recalled: of requests that left; None if none brought anything back.
    """

    fields: dict[str, dict[str, Any]]
    evicted_tokens: dict[str, dict[str, int]]
    recalled: Recalled | None = None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        return self


def _growth(request: Request, terms: Terms) -> Growth:
    return Growth(quota=asdict(terms.quota), prompt_tokens=request.num_prompt_tokens)


@dataclass
class Answers:
    """Makes what is said of requests that end.

    Args:
        says: whether answers say it.
        meters: whether the front end counts it.
        model_name, engine: labels of its metrics.
        host_blocks: blocks of host memory by state, when asked; None without any.
    """

    says: bool
    meters: bool
    model_name: str
    engine: str
    host_blocks: Callable[[], dict[str, int]] | None = None
    _recalled: Recalled = field(default_factory=Recalled, init=False)
    _fields: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    _evicted_tokens: dict[str, dict[str, int]] = field(default_factory=dict, init=False)
    _followed: set[str] = field(default_factory=set, init=False)

    def note(self, output: ModelRunnerOutput, alive: Container[str]) -> None:
        """Take what a worker told with a step; of those that ended meanwhile nobody asks."""
        meta = getattr(output.kv_connector_output, "kv_connector_worker_meta", None)
        if not isinstance(meta, Told):
            return
        if meta.recalled is not None:
            self._recalled.add(meta.recalled)
        for request_id in filter(alive.__contains__, meta.fields):
            is_new = self._fields.get(request_id) != meta.fields[request_id]
            self._fields[request_id] = meta.fields[request_id]
            self._evicted_tokens[request_id] = meta.evicted_tokens[request_id]
            if is_new:
                # what stays may be chosen behind the first token, so this did not go with it
                self._followed.discard(request_id)

    def forget(self, request_id: str) -> None:
        """A request ended."""
        self._fields.pop(request_id, None)
        self._evicted_tokens.pop(request_id, None)
        self._followed.discard(request_id)

    def may_stop(self, request: Request) -> bool:
        """Whether the front end may end a request, at a stop string, and was not told of it."""
        if request.request_id in self._followed or request.sampling_params is None:
            return False
        return bool(request.sampling_params.stop)

    def of(
        self, request: Request, terms: Terms, peak_blocks: int, *, goes_on: bool = False
    ) -> dict[str, Any]:
        """What travels with the answer of a request.

        Args:
            request: it has computed all but its last token.
            terms: what it was held to.
            peak_blocks: most blocks that it held.
            goes_on: whether the front end may end it later, and must know how it grows.
        """
        said = self._report(request, terms, peak_blocks)
        travels: dict[str, Any] = {REPORT: said} if self.says else {}
        message = self._message(request.request_id, said)
        if self.host_blocks is not None:
            recalled, self._recalled = self._recalled, Recalled()
            message = replace(message, recalled=asdict(recalled))
        if goes_on:
            self._followed.add(request.request_id)
            message = replace(message, grows=_growth(request, terms))
        if self.meters or goes_on:
            travels |= message.as_params()
        return travels

    def _report(self, request: Request, terms: Terms, peak_blocks: int) -> dict[str, Any]:
        quota, prompt_tokens = terms.quota, request.num_prompt_tokens
        computed_tokens = max(0, request.num_tokens - 1)
        return {
            "policy": terms.policy,
            "quota_blocks": quota.blocks if quota.compresses else None,
            "block_tokens": quota.block_tokens,
            "peak_blocks": peak_blocks,
            "full_cache_blocks": ceil_div(computed_tokens, quota.block_tokens),
            "prompt_tokens": prompt_tokens,
            "preemptions": request.num_preemptions,
            "output_compactions": quota.compactions(computed_tokens, prompt_tokens),
            **self._fields.get(request.request_id, {}),
        }

    def _message(self, request_id: str, said: dict[str, Any]) -> Message:
        milliseconds = said.get("compression_ms")
        return Message(
            counts=self.meters,
            model_name=self.model_name,
            engine=self.engine,
            policy=said["policy"],
            peak_blocks=said["peak_blocks"],
            full_cache_blocks=said["full_cache_blocks"],
            evicted_tokens=self._evicted_tokens.get(request_id),
            retained_mass=said.get("retained_mass"),
            compression_seconds=None if milliseconds is None else milliseconds / 1000,
            host_blocks=None if self.host_blocks is None else self.host_blocks(),
        )
