"""Where the pool's bytes come from: what is left of a GPU's memory beside all else."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from vllm_budgetkv.cli.activations import FORMULA, layer_elements
from vllm_budgetkv.cli.figures import Figure, Origin, size_text
from vllm_budgetkv.cli.weights import weights_of

if TYPE_CHECKING:
    from vllm_budgetkv.cli.encoder import Encoder
    from vllm_budgetkv.cli.engine import PlannedEngine
    from vllm_budgetkv.cli.wishes import Wishes

# logits in the model's dtype and in float32, and what sampling sorts of the latter
LOGITS_COPIES_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Memory of the KV cache on one GPU.

    Args:
        num_bytes: of the pool.
        options: the options that make it larger.
        shares: what the rest of the GPU's memory is for, by name; empty where the pool was given.
        total: what vLLM may take of a GPU; None where the pool was given.
    """

    num_bytes: int
    options: str
    shares: dict[str, Figure]
    total: Figure | None = None

    @property
    def is_estimate(self) -> bool:
        return not all(share.is_backed for share in self.shares.values())


def pool_of(engine: PlannedEngine, wishes: Wishes, encoder: Encoder | None) -> Pool | None:
    """The pool of one GPU; None where nothing says how much memory there is.

    Raises:
        ValueError: nothing is left for it, with all shares; or weights of unknown size.
    """
    given_bytes = engine.cache_config.kv_cache_memory_bytes
    if given_bytes is not None:
        return Pool(num_bytes=given_bytes, options="--kv-cache-memory-bytes", shares={})
    if wishes.gpu_bytes is None:
        return None
    utilization = engine.cache_config.gpu_memory_utilization
    total = Figure(
        ceil(wishes.gpu_bytes * utilization),
        Origin.GIVEN,
        f"{size_text(wishes.gpu_bytes)} x --gpu-memory-utilization {utilization:g}",
    )
    shares = _shares_of(engine, wishes, encoder)
    left_bytes = total.num_bytes - sum(share.num_bytes for share in shares.values())
    if left_bytes <= 0:
        told = ", ".join(f"{name} {size_text(s.num_bytes)}" for name, s in shares.items())
        raise ValueError(
            f"nothing is left for the KV cache: of {size_text(wishes.gpu_bytes)} vLLM takes "
            f"{size_text(total.num_bytes)}, and there are {told}: raise --gpu-memory, "
            "--gpu-memory-utilization or --tensor-parallel-size, or bound the tower with "
            "--limit-mm-per-prompt"
        )
    options = "--gpu-memory or --gpu-memory-utilization"
    return Pool(num_bytes=left_bytes, options=options, shares=shares, total=total)


def _shares_of(engine: PlannedEngine, wishes: Wishes, encoder: Encoder | None) -> dict[str, Figure]:
    """What is no KV cache, in the order of a reader."""
    weights = weights_of(engine.model_config, wishes.weights_bytes)
    num_gpus = engine.parallel_config.tensor_parallel_size
    shares = {"weights": weights}
    if num_gpus > 1:
        shares["weights"] = Figure(
            weights.num_bytes // num_gpus,
            Origin.ESTIMATE,
            f"{weights.source}, {size_text(weights.num_bytes)} over {num_gpus} GPUs",
        )
    if encoder is not None and encoder.cache is not None:
        shares["encoder cache"] = encoder.cache
    if encoder is not None and encoder.tower is not None:
        shares["the vision tower"] = encoder.tower
    shares["the language model"] = _step_peak(engine)
    shares["CUDA, graphs, NCCL"] = Figure(wishes.reserve_bytes, Origin.ASSUMED, "--reserve")
    return shares


def _step_peak(engine: PlannedEngine) -> Figure:
    """Activations of a full batch, and the logits of its requests."""
    model, scheduler = engine.model_config, engine.scheduler_config
    text, num_gpus = model.hf_text_config, engine.parallel_config.tensor_parallel_size
    width, element_bytes = model.get_hidden_size(), model.dtype.itemsize
    mlp_width = getattr(text, "intermediate_size", None) or 4 * width
    token_elements = layer_elements(width, mlp_width // num_gpus)
    logits_bytes = model.get_vocab_size() * (element_bytes + LOGITS_COPIES_BYTES)
    batch_tokens, num_requests = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
    return Figure(
        batch_tokens * token_elements * element_bytes + num_requests * logits_bytes,
        Origin.ESTIMATE,
        f"{batch_tokens:,} tokens x {FORMULA}, h {width:,}, i "
        f"{mlp_width // num_gpus:,}, and {num_requests:,} x logits",
    )
