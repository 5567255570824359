"""What the engines of these tests run on: this machine's NVIDIA GPU, else its CPU.

On a GPU the engines share it, each with a little of its memory, and Triton multiplies float32 in
float32, in vLLM's kernels too: they would take tf32, whose tokens differ from anyone's.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_budgetkv.start.platforms import CUDA
from vllm_budgetkv.testing import triton_cpu

ON_GPU = torch.cuda.is_available()
# backend that vLLM takes for layers in float32, and the modules of its runners
STOCK_BACKEND = "TRITON_ATTN" if ON_GPU else "CPU_ATTN"
RUNNER_MODULES = (
    {"v1": "vllm.v1.worker.gpu_model_runner", "v2": "vllm.v1.worker.gpu.model_runner"}
    if ON_GPU
    else {"v1": "vllm.v1.worker.cpu_model_runner", "v2": "vllm.v1.worker.cpu.model_runner"}
)
# arguments that every engine gets
ENGINE: dict[str, Any] = (
    {"kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.02} if ON_GPU else {}
)

# sizes of the graphs of decode steps, and the arguments with which a GPU captures them
CAPTURE_SIZES = [1, 2, 4]
GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": CAPTURE_SIZES,
    },
}


def of_runner(name: str) -> dict[str, str]:
    """Variables that choose model runner `v1` or `v2`, whose kernels a CPU interprets."""
    precise = {"TRITON_F32_DEFAULT": "ieee"} if ON_GPU else {}
    if name == "v1":
        return precise | {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    return precise | {"VLLM_USE_V2_MODEL_RUNNER": "1"} if ON_GPU else triton_cpu.environment()


def allowed(budget: dict[str, Any]) -> dict[str, Any]:
    """Options of ours with the one that a device needs on which the tests have not passed yet."""
    return budget | {"unproven_device": True} if ON_GPU and not CUDA.is_proven else budget
