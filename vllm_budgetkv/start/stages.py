"""Pipeline parallel: a worker for each stage of layers, and what is not served so.

Every stage keeps the keys and values of its own layers in a pool of its own, under the block ids
of the one scheduler; so the layers of a quota (L) are those of a stage, and all must have as many.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

from vllm_budgetkv.policy import POLICIES, Policy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.config import VllmConfig

    from vllm_budgetkv.start.config import BudgetConfig
    from vllm_budgetkv.start.engine_config import EngineConfig

FLAG = "--pipeline-parallel-size"


def is_staged(engine: EngineConfig) -> bool:
    """Whether the layers of a model are spread over several stages."""
    return engine.parallel_config.pipeline_parallel_size > 1


def layers_of_stages(engine: EngineConfig) -> list[int]:
    """Layers of each stage, as vLLM splits them.

    Raises:
        ValueError: vLLM's own, of a VLLM_PP_LAYER_PARTITION that does not fit the model.
    """
    # vLLM counts the layers of a rank
    parallel = copy(engine.parallel_config)
    found = []
    for stage in range(parallel.pipeline_parallel_size):
        parallel.rank = stage * parallel.tensor_parallel_size
        found.append(engine.model_config.get_num_layers(parallel))
    return found


def reasons(vllm_config: VllmConfig, config: BudgetConfig) -> Iterator[str]:
    """Why several stages are refused, each with the option to change."""
    if not is_staged(vllm_config):
        return
    counts = layers_of_stages(vllm_config)
    asked = f"{FLAG} {len(counts)}"
    if len({*counts}) > 1:
        yield (
            f"stages must have equally many layers, {asked} gives them {counts}: set it to a "
            f"divisor of {sum(counts)} and unset VLLM_PP_LAYER_PARTITION"
        )
    for name in config.policies:
        if spreads_over_layers(name):
            yield (
                f"policy {name} shares a budget among the layers of a model, but a stage knows "
                f"its own: choose another policy or set {asked} to 1"
            )
    if config.host_bytes:
        yield f"host memory was not tried with stages: remove --kv-host-memory or set {asked} to 1"
    if config.trace_file is not None:
        yield f"a trace is of all layers: remove --kv-trace-file or set {asked} to 1"
    if changes := [*_without_a_trial(vllm_config)]:
        # nothing of ours: stock vLLM starts, and its engine ends in the second stage
        yield (
            f"on a CPU vLLM's model runner V1 serves {asked} only as it compiles the model: "
            f"{' and '.join(changes)}, or set {asked} to 1"
        )


def spreads_over_layers(policy: str) -> bool:
    """Whether a policy has budgets that differ from layer to layer."""
    return POLICIES[policy].layer_budgets is not Policy.layer_budgets


def _without_a_trial(vllm_config: VllmConfig) -> Iterator[str]:
    """What to change, where vLLM never makes the tensors that a later stage receives.

    Its runner V1 makes them in the trial run in front of a compilation, which a CPU's leaves out
    (`CPUModelRunner.warming_up_model`), and asserts them when a prompt comes.
    """
    from vllm import envs
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or vllm_config.use_v2_model_runner:
        return
    if envs.VLLM_CPU_CI_ENV:
        yield "unset VLLM_CPU_CI_ENV"
    if vllm_config.lora_config is not None:
        # with adapters vLLM compiles nothing on a CPU
        yield "remove --enable-lora"
    elif vllm_config.compilation_config.mode == CompilationMode.NONE:
        yield "remove --enforce-eager, or mode 0 of --compilation-config"
