"""A front end's two ends: what requests ask for, and what the engine core says of those that ended.

Both wrap vLLM's processors in a process that configures an engine with a policy. What passes there
of engines without one is left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from vllm_budgetkv.metrics.message import Followed, Message
from vllm_budgetkv.metrics.meters import meters
from vllm_budgetkv.start import frame_groups, upstream
from vllm_budgetkv.start.activation import is_active, rules_of
from vllm_budgetkv.start.pictures import Pictures
from vllm_budgetkv.start.request_check import check, check_items, check_pictures, refusal

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor

    from vllm_budgetkv.start.request_rules import RequestRules

# of each front end that a request has come through
_rules: WeakKeyDictionary[InputProcessor, RequestRules] = WeakKeyDictionary()
_item_tokens: WeakKeyDictionary[InputProcessor, int | None] = WeakKeyDictionary()
# requests that may end in each front end, by id
_followed: WeakKeyDictionary[OutputProcessor, dict[str, Followed]] = WeakKeyDictionary()


def install() -> None:
    """Wrap this process's processors, once."""
    upstream.wrap("InputProcessor.process_inputs", _process_inputs)
    upstream.wrap("OutputProcessor.process_outputs", _process_outputs)


def _process_inputs(
    original: Any, self: InputProcessor, *args: Any, **kwargs: Any
) -> EngineCoreRequest:
    if not is_active(self.vllm_config):
        return original(self, *args, **kwargs)
    rules, most_tokens = _rules_of(self), _item_tokens_of(self)
    request = original(self, *args, **kwargs)
    try:
        check(rules, self.vllm_config, request)
        if most_tokens is not None:
            check_items(request, most_tokens)
        check_pictures(rules, Pictures.of(self.vllm_config, rules.default.quota), request)
    except refusal():
        meters().was_refused(self.vllm_config.model_config.served_model_name)
        _forget_items(self, request)
        raise
    return request


def _forget_items(processor: InputProcessor, request: EngineCoreRequest) -> None:
    """Let the items of a refused request be sent again: the engine has not got them."""
    items = processor.renderer.mm_processor_cache
    for feature in request.mm_features or ():
        if items is not None and feature.data is not None and feature.mm_hash is not None:
            items.invalidate(feature.mm_hash)


def _rules_of(processor: InputProcessor) -> RequestRules:
    rules = _rules.get(processor)
    if rules is None:
        config = processor.vllm_config
        rules = _rules[processor] = rules_of(config)
        quota = rules.default.quota
        if quota.compresses:
            meters().has_quota(config.model_config.served_model_name, quota.blocks)
    return rules


def _item_tokens_of(processor: InputProcessor) -> int | None:
    """Embeddings of the largest item by vLLM's counts; None where it checks that itself.

    Where videos are computed in groups of frames, they may be longer, so its check is ours then.
    """
    if processor not in _item_tokens:
        config, found = processor.vllm_config, None
        if processor.supports_mm_inputs and not frame_groups.reasons_to_keep_whole(config):
            found = processor.mm_encoder_cache_size
            processor.mm_encoder_cache_size = config.model_config.max_model_len
        _item_tokens[processor] = found
    return _item_tokens[processor]


def _process_outputs(
    original: Any,
    self: OutputProcessor,
    engine_core_outputs: Sequence[EngineCoreOutput],
    *args: Any,
    **kwargs: Any,
) -> Any:
    followed = _followed.setdefault(self, {})
    for output in engine_core_outputs:
        if output.kv_transfer_params:
            _take(output, followed, self.request_states)
        elif (one := followed.get(output.request_id)) is not None:
            one.grow(len(output.new_token_ids))
            output.kv_transfer_params = one.params
        if output.finish_reason is not None:
            followed.pop(output.request_id, None)
    processed = original(self, engine_core_outputs, *args, **kwargs)
    for request_id in processed.reqs_to_abort:
        # it ended here, at a stop string, which the engine core does not know
        if (one := followed.pop(request_id, None)) is not None and one.message.counts:
            meters().ended(one.message, "stop")
    for request_id in [name for name in followed if name not in self.request_states]:
        del followed[request_id]
    return processed


def _take(output: EngineCoreOutput, followed: dict[str, Followed], alive: Container[str]) -> None:
    """Take the message of a request, which ended or may end here. Mutates the first two.

    One that is not alive was ended here, at a stop string, and counted then.
    """
    params = output.kv_transfer_params
    assert params is not None
    message = Message.take(params)
    # a client sees what there was without us
    output.kv_transfer_params = params or None
    if message is None:
        return
    if message.counts:
        meters().told(message)
    if message.grows is not None:
        one = Followed(message, output.kv_transfer_params)
        if (known := followed.get(output.request_id)) is not None:
            one.go_on(known, len(output.new_token_ids))
        followed[output.request_id] = one
    elif message.counts and output.request_id in alive:
        meters().ended(message, str(output.finish_reason))
