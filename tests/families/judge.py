"""What a class of Transformers answers: `python -m tests.families.judge`, job on stdin.

The judge of families that vLLM itself does not run on a CPU: in the place of its answers stand
those of Transformers' class of the same weights, which knows nothing of vLLM or of us. A job that
`rounds` has keys and values kept as 8-bit floats.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

NAME = "Transformers"


class RoundedCache(DynamicCache):
    """Keys and values as `--kv-cache-dtype fp8` stores them, in units of 1."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().update(rounded(key_states), rounded(value_states), *args, **kwargs)


def rounded(states: torch.Tensor) -> torch.Tensor:
    """The nearest 8-bit floats; none of `states`, [..., D], is beyond the largest."""
    return states.to(torch.float8_e4m3fn).to(states.dtype)


@torch.inference_mode()
def answer(
    model: Any, cache: DynamicCache, prompt: torch.Tensor, request: dict[str, Any]
) -> dict[str, Any]:
    """Greedy tokens of a request, with the likeliest of each step, as `tests.e2e.job` tells them.

    Args:
        model: a causal language model.
        cache: empty.
        prompt: int64 [1, T].
        request: with the number of `logprobs`.
    """
    tokens: list[int] = []
    logprobs, ids = [], prompt
    for _ in range(request.get("max_tokens", 16)):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found = torch.log_softmax(out.logits[0, -1].float(), dim=-1)
        best = found.topk(request["logprobs"])
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        logprobs.append({str(token): likely for token, likely in pairs})
        tokens.append(int(best.indices[0]))
        ids = best.indices[None, :1]
    return {"prompt_tokens": prompt.shape[1], "tokens": tokens, "logprobs": logprobs}


def main() -> None:
    job = json.load(sys.stdin)
    vocabulary = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], attn_implementation="eager").eval()
    answers = {}
    for request in job["requests"]:
        content = [{"type": "text", **part} for part in request["content"]]
        messages = [{"role": "user", "content": content}]
        text = vocabulary.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = vocabulary(text, add_special_tokens=False, return_tensors="pt").input_ids
        cache = (RoundedCache if job["rounds"] else DynamicCache)(config=model.config)
        answers[request["name"]] = answer(model, cache, prompt, request)
    found = {"answers": answers, "engine": {"backends": [NAME]}}
    Path(job["answer_file"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
