"""What an answer says of its request: the proof that its quota held, and what it cost.

It travels as `kv_transfer_params["budgetkv"]`, which vLLM takes from the scheduler to the body of a
response and to `RequestOutput`. What only reports never ends a request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata

from vllm_budgetkv.arithmetic.quota import ceil_div

if TYPE_CHECKING:
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from vllm_budgetkv.arithmetic.terms import Terms


@dataclass
class Told(KVConnectorWorkerMetadata):
    """Fields of answers, by request id. One rank speaks for all: their quotas are the same."""

    fields: dict[str, dict[str, Any]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        return self


@dataclass
class Answers:
    """What workers told of unfinished requests.

    Args:
        told: by request id.
    """

    told: dict[str, dict[str, Any]] = field(default_factory=dict)

    def note(self, output: ModelRunnerOutput) -> None:
        """Take what a worker told with a step."""
        meta = getattr(output.kv_connector_output, "kv_connector_worker_meta", None)
        if isinstance(meta, Told):
            self.told.update(meta.fields)

    def forget(self, request_id: str) -> None:
        """A request ended."""
        self.told.pop(request_id, None)

    def of(self, request: Request, terms: Terms, peak_blocks: int) -> dict[str, Any]:
        """What the answer of a request that ends says.

        Args:
            request: it has computed all but its last token.
            terms: what it was held to.
            peak_blocks: most blocks that it held.
        """
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
            **self.told.get(request.request_id, {}),
        }
