"""Builds models and finds how their queries turn: `python -m tests.e2e.rotaries_job`, job on stdin.

No engine is started. A process of its own, because vLLM changes classes of Transformers for good.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

from vllm_budgetkv.cache.probe.rotaries import find_rotaries
from vllm_budgetkv.worker.query_samples import sample_queries
from vllm_budgetkv.worker.worker import backend_registered


def build(arguments: dict[str, Any]) -> tuple[torch.nn.Module, Any]:
    """A model with random weights, and its configuration."""
    config = EngineArgs(
        skip_tokenizer_init=True, enforce_eager=True, **arguments
    ).create_engine_config()
    with set_current_vllm_config(config), backend_registered():
        parallel_state.ensure_model_parallel_initialized(1, 1)
        model = initialize_model(vllm_config=config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.data.normal_(std=0.1, generator=generator)
    process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    return model, config


def rotaries_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Class of the model, and how each of its layers turns queries; or why that is not known."""
    model, config = build(arguments)
    runner = SimpleNamespace(
        get_model=lambda: model,
        device=torch.device("cpu"),
        supports_mm_inputs=False,
        lora_config=None,
        maybe_dummy_run_with_lora=lambda *_: nullcontext(),
    )
    layers = config.compilation_config.static_forward_context
    try:
        found = find_rotaries(
            model,
            config.model_config.hf_text_config,
            partial(sample_queries, runner, config),
            config.model_config.max_model_len,
            8,
            {name: index for index, name in enumerate(layers)},
        )
    except ValueError as error:
        return {"backend": type(model).__name__, "refused": str(error)}
    return {
        "backend": type(model).__name__,
        "layers": [*found],
        "starts": sorted({rotary.start for rotary in found.values()}),
        "has_gain": any(rotary.gain is not None for rotary in found.values()),
        "has_temperature": any(rotary.temperature is not None for rotary in found.values()),
    }


def main() -> None:
    job = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        parallel_state.init_distributed_environment(1, 0, store, 0, "gloo")
        answers = {name: rotaries_of(arguments) for name, arguments in job["models"].items()}
    Path(job["answer_file"]).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
