"""What vLLM does on a GPU and not on a CPU, done on a CPU: warm-up requests and CUDA graphs.

On a GPU vLLM does it itself, and `install` only notes which graphs are replayed.

Model Runner V2 itself builds the graphs' inputs, dispatches to them and pads the batch. Only the
graph is a double: it replays by running the captured forward again, with the metadata of the
capture, and without what a replay does not run: hooks of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm import SamplingParams
from vllm.config import CUDAGraphMode
from vllm.config.compilation import CompilationConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu import warmup
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from tests.e2e import devices
from vllm_budgetkv.worker.worker import BudgetWorker

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Graph:
    """A captured forward; counts its replays."""

    forward: Callable[[], None]
    num_tokens: int
    replays: ClassVar[list[int]] = []
    is_replaying: ClassVar[bool] = False

    def replay(self) -> None:
        Graph.replays.append(self.num_tokens)
        Graph.is_replaying = True
        try:
            self.forward()
        finally:
            Graph.is_replaying = False


def install() -> None:
    """Make this process start its engine as on a GPU, and note the graphs that it replays."""
    if devices.ON_GPU:
        CudaGraphManager.run_fullgraph = noted(CudaGraphManager.run_fullgraph)
        return
    # replaces functions of `torch.cuda`
    from vllm.v1.worker.cpu_worker import CPUWorker

    CompilationConfig.resolve_cudagraph_mode_and_sizes = resolve_mode
    CudaGraphManager.capture = capture
    CPUWorker.determine_available_memory = before(
        CPUWorker.determine_available_memory, profile_graphs
    )
    CPUWorker.compile_or_warm_up_model = before(CPUWorker.compile_or_warm_up_model, warm_up)
    BudgetWorker.see_positions = unless_replaying(BudgetWorker.see_positions)
    platform = type(current_platform)
    platform._global_graph_pool = None
    platform.graph_pool_handle = platform.get_global_graph_pool = staticmethod(object)
    for name in ("synchronize", "empty_cache"):
        setattr(torch.accelerator, name, lambda *args: None)
    torch.accelerator.get_memory_info = lambda *args: (1 << 30, 1 << 30)
    # vLLM's sampling kernels do not all run in the interpreter
    SamplingParams.for_sampler_warmup = staticmethod(
        lambda: SamplingParams(temperature=0.0, max_tokens=4)
    )


def noted(replay: Any) -> Any:
    def replay_and_note(self: Any, desc: Any) -> Any:
        Graph.replays.append(desc.num_tokens)
        return replay(self, desc)

    return replay_and_note


def before(method: Any, action: Any) -> Any:
    def both(self: Any) -> Any:
        action(self)
        return method(self)

    return both


def unless_replaying(method: Any) -> Any:
    def guarded(self: Any, *args: Any) -> None:
        if not Graph.is_replaying:
            method(self, *args)

    return guarded


def resolve_mode(
    self: Any, support: AttentionCGSupport, backend: str, *args: Any, **kwargs: Any
) -> CUDAGraphMode:
    """Graphs for decode, as for a backend with our support; vLLM's own choice is none on a CPU."""
    assert support.value >= AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE.value, backend
    want_graphs(self)
    return self.cudagraph_mode


def want_graphs(config: CompilationConfig) -> None:
    config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    config.cudagraph_capture_sizes = devices.CAPTURE_SIZES
    config.max_cudagraph_capture_size = devices.CAPTURE_SIZES[-1]


def capture(self: Any, create_forward_fn: Any, progress_bar_desc: str = "") -> None:
    """Capture as `CudaGraphManager.capture` does, into graphs of ours."""
    with torch.inference_mode():
        for desc in self._capture_descs[CUDAGraphMode.FULL]:
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            forward = create_forward_fn(desc, warmup=False)
            forward(CUDAGraphMode.NONE)
            self.graphs[desc] = Graph(lambda f=forward: f(CUDAGraphMode.NONE), desc.num_tokens)
    self._graphs_captured = True


def profile_graphs(worker: Any) -> None:
    """As the GPU's worker: graphs over a small cache, before it knows how large the cache gets."""
    want_graphs(worker.model_runner.compilation_config)
    worker.model_runner.profile_cudagraph_memory()


def warm_up(worker: Any) -> None:
    """As the GPU's worker: requests that no client sent, then the graphs."""
    runner = worker.model_runner
    warmup.warmup_kernels(runner, worker.execute_model, lambda grammar: worker.sample_tokens(None))
    # there is no workspace to lock on a CPU
    runner.capture_model(profile_only=True)
