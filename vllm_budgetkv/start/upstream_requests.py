"""What a request's own terms and its report touch in vLLM: from the front end to the answer."""

from __future__ import annotations

from vllm_budgetkv.start.touchpoint import Touchpoint

_OUTPUTS = "vllm.v1.outputs"
_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base"

# fmt: off
REQUEST_TOUCHPOINTS = (
    Touchpoint("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", "wrap",
               "what a request asks for is refused before it is passed on"),
    Touchpoint("vllm.v1.engine.output_processor", "OutputProcessor.process_outputs", "wrap",
               "vllm:budgetkv_* count what ended"),
    Touchpoint("vllm.exceptions", "VLLMValidationError", "subclass",
               "an error that a server answers with HTTP 400",
               ("message", "parameter", "value")),
    Touchpoint("vllm.v1.worker.gpu_worker", "Worker.sample_tokens", "override",
               "what was counted of a prompt goes along with the step's tokens",
               ("self", "grammar_output")),
    Touchpoint(_OUTPUTS, "AsyncModelRunnerOutput.get_output", "override", "the same", ("self",)),
    Touchpoint(_CONNECTOR, "KVConnectorWorkerMetadata.aggregate", "override",
               "the same: one rank speaks for all",
               ("self", "other")),
    Touchpoint("vllm.sampling_params", "SamplingParams", "subclass",
               "a look-ahead's tell the worker for whom it runs"),
)
# fmt: on
