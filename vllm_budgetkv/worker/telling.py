"""From a worker to the engine core: what it counted of requests goes along with a step's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.outputs import AsyncModelRunnerOutput, KVConnectorOutput

from vllm_budgetkv.cache.notices import warn_once
from vllm_budgetkv.scheduler.answers import Told

if TYPE_CHECKING:
    from vllm.v1.outputs import ModelRunnerOutput

    from vllm_budgetkv.cache.report import Counted


class ToldOutput(AsyncModelRunnerOutput):
    """A step's output that is not there yet, and what is told with it."""

    def __init__(self, output: AsyncModelRunnerOutput, counted: Counted) -> None:
        self._output = output
        self._counted = counted

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        _add(output, self._counted)
        return output


def tell(
    output: ModelRunnerOutput | AsyncModelRunnerOutput, counted: Counted
) -> ModelRunnerOutput | AsyncModelRunnerOutput:
    """The output of a step together with what was counted in it. May mutate `output`."""
    if isinstance(output, AsyncModelRunnerOutput):
        return ToldOutput(output, counted)
    _add(output, counted)
    return output


def _add(output: ModelRunnerOutput, counted: Counted) -> None:
    try:
        told = Told(
            {name: summary.as_fields() for name, summary in counted.summaries.items()},
            {name: summary.evicted_tokens for name, summary in counted.summaries.items()},
            counted.recalled,
        )
    except Exception:  # noqa: BLE001
        # what only reports does not end a request
        warn_once("what requests keep cannot be read: their answers do not say it")
        return
    if output.kv_connector_output is None:
        output.kv_connector_output = KVConnectorOutput()
    output.kv_connector_output.kv_connector_worker_meta = told
