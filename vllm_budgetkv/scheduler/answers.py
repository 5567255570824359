"""What an answer says of its request: the proof that its quota held, and what it cost.

It travels as `kv_transfer_params["budgetkv"]`, which vLLM takes from the scheduler to the body of a
response and to `RequestOutput`; beside it a message for the metrics, which the front end takes out.
What only reports never ends a request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata

from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.metrics.message import Message
from vllm_budgetkv.start.config import SECTION

if TYPE_CHECKING:
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from vllm_budgetkv.arithmetic.terms import Terms


@dataclass
class Told(KVConnectorWorkerMetadata):
    """What a worker counted of requests, by id. One rank speaks for all: their quotas are the same.

    Args:
        fields: of their answers.
        evicted_tokens: by class of head, summed over the heads of the rank.
    """

    fields: dict[str, dict[str, Any]]
    evicted_tokens: dict[str, dict[str, int]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        return self


@dataclass
class Answers:
    """Makes what is said of requests that end.

    Args:
        says: whether answers say it.
        meters: whether the front end counts it.
        model_name, engine: labels of its metrics.
    """

    says: bool
    meters: bool
    model_name: str
    engine: str
    _fields: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    _evicted_tokens: dict[str, dict[str, int]] = field(default_factory=dict, init=False)

    def note(self, output: ModelRunnerOutput) -> None:
        """Take what a worker told with a step."""
        meta = getattr(output.kv_connector_output, "kv_connector_worker_meta", None)
        if isinstance(meta, Told):
            self._fields.update(meta.fields)
            self._evicted_tokens.update(meta.evicted_tokens)

    def forget(self, request_id: str) -> None:
        """A request ended."""
        self._fields.pop(request_id, None)
        self._evicted_tokens.pop(request_id, None)

    def of(self, request: Request, terms: Terms, peak_blocks: int) -> dict[str, Any]:
        """What travels with the answer of a request that ends.

        Args:
            request: it has computed all but its last token.
            terms: what it was held to.
            peak_blocks: most blocks that it held.
        """
        said = self._report(request, terms, peak_blocks)
        travels: dict[str, Any] = {SECTION: said} if self.says else {}
        if self.meters:
            travels |= self._message(request.request_id, said).as_params()
        return travels

    def _report(self, request: Request, terms: Terms, peak_blocks: int) -> dict[str, Any]:
        quota, prompt_tokens = terms.quota, request.num_prompt_tokens
        computed_tokens = max(0, request.num_tokens - 1)
        return {
            "policy": terms.policy,
            "quota_blocks": quota.blocks if quota.compresses else None,
            "block_tokens": quota.page_tokens,
            "peak_blocks": peak_blocks,
            "full_cache_blocks": ceil_div(computed_tokens, quota.page_tokens),
            "prompt_tokens": prompt_tokens,
            "preemptions": request.num_preemptions,
            "output_compactions": quota.compactions(computed_tokens, prompt_tokens),
            **self._fields.get(request.request_id, {}),
        }

    def _message(self, request_id: str, said: dict[str, Any]) -> Message:
        milliseconds = said.get("compression_ms")
        return Message(
            model_name=self.model_name,
            engine=self.engine,
            policy=said["policy"],
            peak_blocks=said["peak_blocks"],
            full_cache_blocks=said["full_cache_blocks"],
            evicted_tokens=self._evicted_tokens.get(request_id),
            retained_mass=said.get("retained_mass"),
            compression_seconds=None if milliseconds is None else milliseconds / 1000,
        )
