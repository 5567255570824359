"""What presses of kvpress cost on transformers, in kvpress' environment; the job comes on stdin.

A press compresses each layer when the prompt has gone through its attention, in one piece. What it
may know is the job's choice: with `aware` the question is part of what is compressed, else it
follows the compressed text, as in kvpress' own pipeline. Then the answer is forced, token by token;
nothing is compressed in decode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from benchmarks.real.peers.judged import answer, judge, read_job
from benchmarks.real.peers.kvpress_cache import CountingCache, decode, load, token_bytes
from benchmarks.real.peers.kvpress_presses import KVzipShares, Layer, several

if TYPE_CHECKING:
    from benchmarks.real.peers.judged import Judged, Question

    Compressed = dict[tuple[str, float], list[Layer]]

FULL = ("transformers", 1.0)


def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    model = load(job["model"])
    found: dict[tuple[str, float], list[Judged]] = {}
    with torch.inference_mode():
        for question in job["questions"]:
            for name, judged in ask(model, question, job).items():
                found.setdefault(name, []).append(judged)
    rows = [{"name": n, "share": s, "judged": judged} for (n, s), judged in found.items()]
    answer(rows)


def ask(model: Any, question: Question, job: dict[str, Any]) -> dict[tuple[str, float], Judged]:
    """One prefill, then the answer forced upon each compressed cache and upon the full one."""
    split = len(question.prompt) if job["aware"] else question.question_start
    ids = torch.tensor([question.prompt])
    cache = CountingCache()
    if job["kvzip"]:
        press = KVzipShares().choose(job["shares"])
    else:
        press = several(job["presses"], job["shares"])
    with press(model):
        logits = model(input_ids=ids[:, :split], past_key_values=cache, logits_to_keep=1).logits
    whole = [Layer(layer.keys, layer.values, None) for layer in cache.layers]
    if job["kvzip"]:
        compressed: Compressed = {
            ("kvzip", share): [
                Layer(layer.keys, layer.values, mask)
                for layer, mask in zip(whole, masks, strict=True)
            ]
            for share, masks in press.masks.items()
        }
    else:
        compressed = {FULL: whole} | press.layers
    measured = cache.peak_bytes / token_bytes(model)
    found = {}
    for name, layers in compressed.items():
        peak = measured if job["kvzip"] else peak_tokens(layers, split)
        steps = force(model, question, layers, split, logits[0, -1])
        kept = sum(layer.kept_tokens() for layer in layers) / len(layers)
        kept += len(question.prompt) - split
        found[name] = judge(question, *steps, max(peak, kept), kept)
    return found


def peak_tokens(layers: list[Layer], prompt_tokens: int) -> float:
    """Most tokens held at once in a prefill with this press alone, mean over the layers.

    A layer holds the whole prompt until it is compressed, and those before it are compressed.
    """
    lengths = [layer.keys.shape[2] for layer in layers]
    held = [sum(lengths[:index]) + prompt_tokens for index in range(len(lengths))]
    return max(held) / len(lengths)


def force(
    model: Any, question: Question, layers: list[Layer], split: int, logits: torch.Tensor
) -> tuple[list[int], list[float]]:
    """Let the rest of the prompt and the right answer follow a compressed cache.

    Args:
        layers: what is left of the first `split` tokens.
        logits: behind them.

    Returns:
        (likeliest token, log-probability of the right one) of every step
    """
    cache = DynamicCache()
    for index, (block, layer) in enumerate(zip(model.model.layers, layers, strict=True)):
        cache.update(layer.keys, layer.values, index)
        block.self_attn.masked_key_indices = layer.masked
    rest = question.prompt[split:]
    if rest:
        positions = torch.arange(split, len(question.prompt))[None]
        ids = torch.tensor([rest])
        out = model(input_ids=ids, past_key_values=cache, position_ids=positions)
        logits = out.logits[0, -1]
    likeliest, logprobs = [], []
    for step, token in enumerate(question.told):
        if step:
            position = len(question.prompt) + step - 1
            logits = decode(model, question.told[step - 1], position, cache)
        likeliest.append(int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(dim=-1)[token]))
    return likeliest, logprobs


if __name__ == "__main__":
    main()
