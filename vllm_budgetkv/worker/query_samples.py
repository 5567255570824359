"""Queries of every layer at known positions, as the model itself makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.model_executor.models.interfaces import requires_raw_input_tokens

from vllm_budgetkv.cache.upload import upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig

NUM_TOKEN_IDS = 3
"""Different tokens that are looked at, each at every position."""


class Listener:
    """Stands in for the step of a batch: keeps the queries of each layer, attends to nothing.

    So what a layer adds to the hidden state does not depend on the position, and the queries of one
    token differ from position to position by what the model does to queries alone.
    """

    def __init__(self) -> None:
        self.queries: dict[str, torch.Tensor] = {}

    def run_layer(
        self,
        layer_name: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Keep `query`, [T, Hq, D]. Mutates `out`."""
        self.queries[layer_name] = query.clone()
        out.zero_()


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
    embeddings = None
    if runner.supports_mm_inputs:
        embeddings = model.embed_input_ids(tokens)
        ids = tokens if requires_raw_input_tokens(model) else None
    listener = Listener()
    one_request = np.array([num_tokens], dtype=np.int32)
    with (
        runner.maybe_dummy_run_with_lora(runner.lora_config, one_request, None),
        # compilation waits for vLLM's own warm-up
        set_forward_context(listener, vllm_config, num_tokens=num_tokens, skip_compiled=True),
    ):
        model(input_ids=ids, positions=places, intermediate_tensors=None, inputs_embeds=embeddings)
    return {
        name: query.view(NUM_TOKEN_IDS, len(positions), *query.shape[1:])
        for name, query in listener.queries.items()
    }
