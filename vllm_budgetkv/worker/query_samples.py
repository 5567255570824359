"""Queries of every layer at known positions, as the model itself makes them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_pp_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.interfaces import requires_raw_input_tokens

from vllm_budgetkv.cache.upload import upload
from vllm_budgetkv.worker.attention import BudgetAttention

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm.config import VllmConfig
    from vllm.sequence import IntermediateTensors

NUM_TOKEN_IDS = 3
"""Different tokens that are looked at, each at every position."""


class Listener:
    """Keeps the queries of each layer of a run without requests, which attends to nothing.

    So what a layer adds to the hidden state does not depend on the position, and the queries of one
    token differ from position to position by what the model does to queries alone. Layers with
    recurrent state are silenced: without requests vLLM leaves their output as it found it.
    """

    def __init__(self) -> None:
        self.queries: dict[str, torch.Tensor] = {}

    def hear(self, layer_name: str, query: torch.Tensor) -> None:
        """Keep a copy of `query`."""
        self.queries[layer_name] = query.clone()


@contextmanager
def heard(vllm_config: VllmConfig) -> Iterator[Listener]:
    """A listener to all of our layers, inside."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    impls = [layer.impl for layer in layers if isinstance(_impl_of(layer), BudgetAttention)]
    recurrent = [x for x in layers if isinstance(x, MambaBase) and isinstance(x, torch.nn.Module)]
    hooks = [layer.register_forward_hook(_silence, with_kwargs=True) for layer in recurrent]
    listener = Listener()
    for impl in impls:
        impl.listener = listener
    try:
        yield listener
    finally:
        for impl in impls:
            impl.listener = None
        for hook in hooks:
            hook.remove()


def _silence(
    layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any
) -> Any:
    """Let a layer add nothing. Mutates the tensor into which it writes, where it returns none."""
    if isinstance(returned, torch.Tensor):
        return torch.zeros_like(returned)
    out = kwargs["output"] if "output" in kwargs else args[1]
    out.zero_()
    return returned


def _received(runner: Any, dtype: torch.dtype, num_tokens: int) -> IntermediateTensors:
    """What a later stage of a pipeline gets: noise, for each token the same at every position.

    The stage before hands on what follows from a token alone, since its layers attend to nothing.
    """
    received = runner.get_model().make_empty_intermediate_tensors(
        batch_size=num_tokens, dtype=dtype, device=runner.device
    )
    chance = torch.Generator().manual_seed(0)
    for tensor in received.tensors.values():
        noise = torch.randn(NUM_TOKEN_IDS, *tensor.shape[1:], generator=chance)
        tensor.copy_(noise.repeat_interleave(num_tokens // NUM_TOKEN_IDS, dim=0))
    return received


def _impl_of(layer: object) -> object:
    return getattr(layer, "impl", None)


@torch.inference_mode()
def sample_queries(
    runner: Any, vllm_config: VllmConfig, positions: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Run the model once on a few tokens, each at every one of `positions`.

    Args:
        runner: vLLM's model runner, with its model loaded.
        vllm_config: its configuration.
        positions: P text positions; `NUM_TOKEN_IDS * P` tokens must fit a batch.

    Returns:
        By name of the layer, [NUM_TOKEN_IDS, P, Hq, D].
    """
    config, model = vllm_config.model_config, runner.get_model()
    vocabulary = config.get_vocab_size()
    spread = [vocabulary * (i + 1) // (NUM_TOKEN_IDS + 1) for i in range(NUM_TOKEN_IDS)]
    num_tokens = NUM_TOKEN_IDS * len(positions)
    tokens = upload(spread, torch.int32, runner.device).repeat_interleave(len(positions))
    ids: torch.Tensor | None = tokens
    places = upload([*positions] * NUM_TOKEN_IDS, torch.int64, runner.device)
    if config.uses_mrope:
        # text has equal ids on all axes
        places = places.expand(config.mrope_num_dims, -1).contiguous()
    received = None if get_pp_group().is_first_rank else _received(runner, config.dtype, num_tokens)
    embeddings = None
    if runner.supports_mm_inputs and received is None:
        embeddings = model.embed_input_ids(tokens)
        ids = tokens if requires_raw_input_tokens(model) else None
    one_request = np.array([num_tokens], dtype=np.int32)
    with (
        heard(vllm_config) as listener,
        runner.maybe_dummy_run_with_lora(runner.lora_config, one_request, None),
        # compilation waits for vLLM's own warm-up
        set_forward_context(None, vllm_config, num_tokens=num_tokens, skip_compiled=True),
    ):
        model(
            input_ids=ids,
            positions=places,
            intermediate_tensors=received,
            inputs_embeds=embeddings,
        )
    return {
        name: query.view(NUM_TOKEN_IDS, len(positions), *query.shape[1:])
        for name, query in listener.queries.items()
    }
