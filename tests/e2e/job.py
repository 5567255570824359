"""Runs one engine in a process of its own: `python -m tests.e2e.job`, job on stdin.

The engine core runs in the same process, so that the job can look at its blocks from the outside
after every step.
"""

from __future__ import annotations

import base64
import json
import sys
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

# an op imports its Triton kernel when it is first called
TRITON_KERNELS = "vllm_budgetkv.ops.triton."


def content_of(part: dict[str, Any]) -> dict[str, Any]:
    """One part of a chat message from its plain description."""
    from vllm_budgetkv.testing.frames import (
        image_data_url,
        render_frame,
        render_video,
        video_data_url,
    )

    if "text" in part:
        return {"type": "text", "text": part["text"]}
    if "video_file" in part:
        data = base64.b64encode(Path(part["video_file"]).read_bytes()).decode()
        return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
    size = tuple(part.get("size_pixels", (112, 112)))
    if "image" in part:
        frame = render_frame(part["image"], size_pixels=size)
        return {"type": "image_url", "image_url": {"url": image_data_url(frame)}}
    frames = render_video(part["video"], size_pixels=size, seed=part.get("seed", 0))
    return {"type": "video_url", "video_url": {"url": video_data_url(frames)}}


class Observer:
    """Reads the engine core's block lists from the outside, after every step."""

    def __init__(self, engine: Any) -> None:
        self.scheduler = engine.engine_core.engine_core.scheduler
        self.held: dict[str, int] = {}
        self.running_at_once = 0
        self.num_lookaheads = 0
        self.num_encoded: dict[str, int] = {}
        self.peak_encoder_tokens = self.peak_tower_tokens = 0
        self.encoded = encoded_of(engine.engine_core.engine_core.model_executor)
        self.schedule, self.scheduler.schedule = self.scheduler.schedule, self.count_encoded

    def count_encoded(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, and note how many items of each request it encodes."""
        scheduled = self.schedule(*args, **kwargs)
        made_tokens = 0
        for request_id, items in scheduled.scheduled_encoder_inputs.items():
            request = self.scheduler.requests[request_id]
            made_tokens += sum(request.get_num_encoder_embeds(item) for item in items)
            self.num_encoded[request_id] = self.num_encoded.get(request_id, 0) + len(items)
        self.peak_tower_tokens = max(self.peak_tower_tokens, made_tokens)
        return scheduled

    def count_lookaheads(self) -> None:
        """Note how many internal requests there are; stock vLLM has none."""
        lookaheads = getattr(self.scheduler, "lookaheads", None)
        if lookaheads is not None:
            self.num_lookaheads = max(self.num_lookaheads, len(lookaheads.parents))

    def look(self) -> None:
        from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        (manager,) = (m for m in managers if isinstance(m, FullAttentionManager))
        for request_id, blocks in manager.req_to_blocks.items():
            self.held[request_id] = max(self.held.get(request_id, 0), len(blocks))
        self.running_at_once = max(self.running_at_once, len(self.scheduler.running))
        # what memory keeps, which views of one storage share
        kept = {rows.untyped_storage().data_ptr(): rows for rows in self.encoded().values()}
        held_tokens = sum(
            rows.untyped_storage().nbytes() // (rows.element_size() * rows.shape[-1])
            for rows in kept.values()
        )
        self.peak_encoder_tokens = max(self.peak_encoder_tokens, held_tokens)


def encoded_of(executor: Any) -> Callable[[], dict[str, Any]]:
    """What gives the encoder's outputs, [tokens, width] by item, that a worker here holds."""
    worker = getattr(executor, "driver_worker", None)
    if worker is None:
        return dict
    runner = worker.worker.model_runner
    if isinstance(runner.encoder_cache, dict | None):
        return lambda: runner.encoder_cache or {}
    return lambda: runner.encoder_cache.encoder_outputs


def prompts_of(llm: Any, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Rendered prompts with their media, by request name."""
    prompts = {}
    for request in requests:
        messages = [{"role": "user", "content": [content_of(p) for p in request["content"]]}]
        (prompts[request["name"]],) = llm._preprocess_chat([messages])
    return prompts


def params_of(request: dict[str, Any]) -> Any:
    """How a request samples: greedily unless it has a seed, and several answers if it asks."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    structure = request.get("structure")
    return SamplingParams(
        n=request.get("n", 1),
        max_tokens=request.get("max_tokens", 16),
        temperature=1.0 if "seed" in request else 0.0,
        seed=request.get("seed"),
        ignore_eos=structure is None,
        logprobs=request.get("logprobs"),
        extra_args=request.get("asks"),
        structured_outputs=structure and StructuredOutputsParams(**structure),
        output_kind=(
            RequestOutputKind.FINAL_ONLY if "n" in request else RequestOutputKind.CUMULATIVE
        ),
    )


def adapter_of(request: dict[str, Any]) -> Any:
    """The LoRA adapter in the folder that a request names, or None."""
    from vllm.lora.request import LoRARequest

    folder = request.get("adapter")
    # vLLM tells adapters apart by a number
    return folder and LoRARequest(folder, 1 + zlib.crc32(folder.encode()) % 2**30, folder)


def drive(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Add, abort and preempt as the job says, step until all is done."""
    engine, requests = llm.llm_engine, job["requests"]
    prompts = prompts_of(llm, requests)
    observer = Observer(engine)
    answers: dict[str, Any] = {}
    step, waiting = 0, list(requests)
    while waiting or engine.has_unfinished_requests():
        for request in [r for r in waiting if r.get("arrives", 0) <= step]:
            waiting.remove(request)
            name = request["name"]
            engine.add_request(
                name, prompts[name], params_of(request), lora_request=adapter_of(request)
            )
            observer.count_lookaheads()
        aborted = [r["name"] for r in requests if r.get("aborts") == step]
        if aborted:
            engine.abort_request(aborted, internal=False)
        if step in job.get("preempts", ()):
            observer.scheduler.reset_prefix_cache(reset_running_requests=True)
        for output in engine.step():
            answers[output.request_id] = {
                "prompt_tokens": len(output.prompt_token_ids),
                "cached_tokens": output.num_cached_tokens,
                "tokens": list(output.outputs[0].token_ids),
                "text": output.outputs[0].text,
                "all_tokens": [list(found.token_ids) for found in output.outputs],
                "logprobs": [
                    {str(token): found.logprob for token, found in step.items()}
                    for step in output.outputs[0].logprobs or ()
                ],
                "said": (output.kv_transfer_params or {}).get("budgetkv"),
            }
        observer.look()
        step += 1
    return {
        "answers": answers,
        "held": observer.held,
        "steps": step,
        "running_at_once": observer.running_at_once,
        "num_lookaheads": observer.num_lookaheads,
        "num_encoded": observer.num_encoded,
        "peak_encoder_tokens": observer.peak_encoder_tokens,
        "peak_tower_tokens": observer.peak_tower_tokens,
    }


def session_outcome(llm: Any) -> str:
    """How the engine core ends a streaming-input session: the reason that its client gets."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    core = llm.llm_engine.engine_core.engine_core
    params = SamplingParams(max_tokens=4, temperature=0.0)
    core.scheduler.add_request(
        Request("session", [5, 6, 7], params, pooling_params=None, resumable=True)
    )
    for _ in range(8):
        outputs, _ = core.step_fn()
        for of_client in (outputs or {}).values():
            for output in of_client.outputs:
                if output.finish_reason is not None:
                    return str(output.finish_reason)
    return "unfinished"


def runner_module(executor: Any) -> str:
    """Module of the model runner's class; "remote" when the workers are processes of their own."""
    worker = getattr(executor, "driver_worker", None)
    return type(worker.worker.model_runner).__module__ if worker else "remote"


def describe(llm: Any) -> dict[str, Any]:
    """What of ours is on the engine's path."""
    core = llm.llm_engine.engine_core.engine_core
    config = core.vllm_config
    layers = list(config.compilation_config.static_forward_context.values())
    return {
        "scheduler": type(core.scheduler).__name__,
        "worker": config.parallel_config.worker_cls,
        "backends": sorted(
            {x.attn_backend.get_name() for x in layers if hasattr(x, "attn_backend")}
        ),
        "runner": runner_module(core.model_executor),
        "kernels": [name for name in sorted(sys.modules) if name.startswith(TRITON_KERNELS)],
        "num_blocks": core.scheduler.kv_cache_config.num_blocks,
        "leftovers": len(core.scheduler.requests),
        "sizes": sizes_of(core),
    }


def sizes_of(core: Any) -> dict[str, Any]:
    """What the engine takes, as itself counts or holds it; of a worker in this process only."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    scheduler, worker = core.scheduler, getattr(core.model_executor, "driver_worker", None)
    if worker is None:
        return {}
    groups = scheduler.kv_cache_config.kv_cache_groups
    (group,) = (g for g in groups if isinstance(g.kv_cache_spec, FullAttentionSpec))
    quota, cache = getattr(scheduler, "quota", None), getattr(worker.worker, "budget_cache", None)
    recaller = None if cache is None else cache.layers.recaller
    return {
        "block_bytes": group.kv_cache_spec.page_size_bytes * len(group.layer_names),
        "quota": None if quota is None else asdict(quota),
        "budget_tokens": None if quota is None else quota.budget_tokens,
        "encoder_cache_tokens": scheduler.encoder_cache_manager.cache_size,
        "host_blocks": None if recaller is None else len(recaller.tier.tokens),
    }


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM

    if job["starts_as_on_gpu"]:
        from tests.e2e import gpu_start

        gpu_start.install()
    np.random.seed(0)
    llm = LLM(**job["engine"])
    answer = drive(llm, job)
    answer["engine"] = describe(llm)
    if job["starts_as_on_gpu"]:
        answer["replays"] = gpu_start.Graph.replays
    if job["session"]:
        answer["session"] = session_outcome(llm)
    Path(job["answer_file"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
