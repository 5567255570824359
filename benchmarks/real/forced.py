"""Makes a request write a given answer, so that its probability can be read step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.logits_process import LogitsProcessor

KEY = "forced_token_ids"


class ForcedAnswer(AdapterLogitsProcessor):
    """Logits of a request whose `extra_args` name its tokens: all but the next one are -inf.

    The log-probabilities that vLLM reports are those before any processor (`raw_logprobs`).
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> LogitsProcessor | None:
        tokens = (params.extra_args or {}).get(KEY)
        if tokens is None:
            return None

        def only_next(written: list[int], logits: torch.Tensor) -> torch.Tensor:
            token = tokens[len(written)]
            kept = logits[token].clone()
            logits.fill_(float("-inf"))
            logits[token] = kept
            return logits

        return only_next
