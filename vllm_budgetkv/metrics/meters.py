"""The metrics of a front end, `vllm:budgetkv_*`, made when the first request is counted.

vLLM unregisters all `vllm:` metrics whenever an engine starts, so each is registered again where it
is not; `LLM.get_metrics()` reads only names with that prefix.
"""

from __future__ import annotations

from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from vllm_budgetkv.arithmetic.recalled import Recalled

if TYPE_CHECKING:
    from vllm_budgetkv.metrics.message import Message

LABELS = ("model_name", "engine")
PREFIX = "vllm:budgetkv_"
BLOCKS = tuple(2**power for power in range(18))
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Meters:
    """Counts requests of this process, whichever engines it has."""

    def __init__(self) -> None:
        self._meter_host_memory()
        self.requests = Counter(
            f"{PREFIX}requests",
            "Requests that ended, by policy and by how.",
            (*LABELS, "policy", "outcome"),
        )
        self.refused = Counter(
            f"{PREFIX}refused_requests",
            "Requests that asked for what the server does not give (HTTP 400).",
            ("model_name",),
        )
        self.peak_blocks = Histogram(
            f"{PREFIX}request_peak_blocks",
            "Most KV blocks that a request held.",
            (*LABELS, "policy"),
            buckets=BLOCKS,
        )
        self.reclaimed_blocks = Counter(
            f"{PREFIX}reclaimed_blocks",
            "KV blocks that a full cache would have held at the end, beyond what requests held.",
            LABELS,
        )
        self.evicted_tokens = Counter(
            f"{PREFIX}evicted_tokens",
            "Prompt tokens that heads dropped, summed over the heads of one rank.",
            (*LABELS, "head_class"),
        )
        self.retained_mass = Histogram(
            f"{PREFIX}retained_mass",
            "Share of the question's attention that was retained of a prompt (an estimate).",
            LABELS,
            buckets=SHARES,
        )
        self.compression_seconds = Histogram(
            f"{PREFIX}compression_seconds",
            "Time of the host that compressing a prompt took.",
            LABELS,
            buckets=SECONDS,
        )
        self.quota_blocks = Gauge(
            f"{PREFIX}quota_blocks",
            "KV blocks that a request may hold which asks for nothing else.",
            ("model_name",),
            multiprocess_mode="mostrecent",
        )

    def _meter_host_memory(self) -> None:
        self.host_blocks = Gauge(
            f"{PREFIX}host_blocks",
            "Blocks of host memory: all, those held by requests, those that a prompt may find.",
            (*LABELS, "state"),
            multiprocess_mode="mostrecent",
        )
        self.recall_steps = Counter(
            f"{PREFIX}recall_steps",
            "Decode steps of requests in which heads looked for tokens in host memory.",
            LABELS,
        )
        self.recalled_tokens = Counter(
            f"{PREFIX}recalled_tokens",
            "Tokens that heads of one rank had brought back, a step each: those that stood there "
            "from the step before (kept) and those that were fetched (moved).",
            (*LABELS, "kind"),
        )
        self.moved_bytes = Counter(
            f"{PREFIX}moved_bytes",
            "Bytes that heads of one rank fetched from host memory in decode.",
            LABELS,
        )

    def ended(self, message: Message, outcome: str) -> None:
        """Count a request that ended."""
        labels = {"model_name": message.model_name, "engine": message.engine}
        policy = message.policy
        self.requests.labels(**labels, policy=policy, outcome=outcome).inc()
        self.peak_blocks.labels(**labels, policy=policy).observe(message.peak_blocks)
        reclaimed_blocks = message.full_cache_blocks - message.peak_blocks
        self.reclaimed_blocks.labels(**labels).inc(max(0, reclaimed_blocks))
        for head_class, tokens in (message.evicted_tokens or {}).items():
            self.evicted_tokens.labels(**labels, head_class=head_class).inc(tokens)
        if message.retained_mass is not None:
            self.retained_mass.labels(**labels).observe(message.retained_mass)
        if message.compression_seconds is not None:
            self.compression_seconds.labels(**labels).observe(message.compression_seconds)

    def told(self, message: Message) -> None:
        """Count what a message says of others than its request, once, whatever becomes of it."""
        labels = {"model_name": message.model_name, "engine": message.engine}
        for state, blocks in (message.host_blocks or {}).items():
            self.host_blocks.labels(**labels, state=state).set(blocks)
        if message.recalled is not None:
            self._brought_back(Recalled(**message.recalled), labels)

    def _brought_back(self, recalled: Recalled, labels: dict[str, str]) -> None:
        self.recall_steps.labels(**labels).inc(recalled.steps)
        kept_tokens = recalled.tokens - recalled.moved_tokens
        for kind, tokens in (("kept", kept_tokens), ("moved", recalled.moved_tokens)):
            # the last step of a request may have fetched what no step is counted for
            self.recalled_tokens.labels(**labels, kind=kind).inc(max(0, tokens))
        self.moved_bytes.labels(**labels).inc(recalled.moved_bytes)

    def has_quota(self, model_name: str, quota_blocks: int) -> None:
        """Note what a request may hold that asks for nothing else."""
        self.quota_blocks.labels(model_name=model_name).set(quota_blocks)

    def was_refused(self, model_name: str) -> None:
        """Count a request that asked for what is not to be had."""
        self.refused.labels(model_name=model_name).inc()


@cache
def _made() -> Meters:
    return Meters()


# requests come in by several threads
_lock = Lock()


def meters() -> Meters:
    """Those of this process, all of them registered."""
    with _lock:
        made = _made()
    for metric in vars(made).values():
        register(metric)
    return made


def register(metric: Any) -> None:
    """Let a metric be seen; one that is seen already is left alone."""
    try:
        REGISTRY.register(metric)
    except ValueError:
        return
