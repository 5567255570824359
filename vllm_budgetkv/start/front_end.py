"""A front end's two ends: what requests ask for, and what the engine core says of those that ended.

Both wrap vLLM's processors in a process that configures an engine with a policy. What passes there
of engines without one is left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from vllm_budgetkv.metrics.message import Message
from vllm_budgetkv.metrics.meters import meters
from vllm_budgetkv.start import upstream
from vllm_budgetkv.start.activation import is_active, rules_of
from vllm_budgetkv.start.request_check import check, refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_budgetkv.start.request_rules import RequestRules

# of each front end that a request has come through
_rules: WeakKeyDictionary[InputProcessor, RequestRules] = WeakKeyDictionary()


def install() -> None:
    """Wrap this process's processors, once."""
    upstream.wrap("InputProcessor.process_inputs", _process_inputs)
    upstream.wrap("OutputProcessor.process_outputs", _process_outputs)


def _process_inputs(
    original: Any, self: InputProcessor, *args: Any, **kwargs: Any
) -> EngineCoreRequest:
    request = original(self, *args, **kwargs)
    if not is_active(self.vllm_config):
        return request
    try:
        check(_rules_of(self), self.vllm_config, request)
    except refusal():
        meters().was_refused(self.vllm_config.model_config.served_model_name)
        raise
    return request


def _rules_of(processor: InputProcessor) -> RequestRules:
    rules = _rules.get(processor)
    if rules is None:
        config = processor.vllm_config
        rules = _rules[processor] = rules_of(config)
        quota = rules.default.quota
        if quota.compresses:
            meters().has_quota(config.model_config.served_model_name, quota.blocks)
    return rules


def _process_outputs(
    original: Any,
    self: Any,
    engine_core_outputs: Sequence[EngineCoreOutput],
    *args: Any,
    **kwargs: Any,
) -> Any:
    for output in engine_core_outputs:
        if output.kv_transfer_params:
            _count(output)
    return original(self, engine_core_outputs, *args, **kwargs)


def _count(output: EngineCoreOutput) -> None:
    """Take the message of a request that ended. Mutates `output`."""
    assert output.kv_transfer_params is not None
    message = Message.take(output.kv_transfer_params)
    if message is not None:
        meters().ended(message, str(output.finish_reason))
        # a client sees what there was without us
        output.kv_transfer_params = output.kv_transfer_params or None
