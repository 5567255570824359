"""OpenVINO GenAI, in its environment; the job comes on stdin.

Its pipeline processes prompts in chunks and keeps all of their blocks; when a prompt ends it evicts
blocks down to its limit, and again while it decodes. A regular expression that only the right
answer fulfils forces that answer; the log-probabilities are those of the model's own logits.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.real.peers.judged import answer, judge, read_job

if TYPE_CHECKING:
    from benchmarks.real.peers.judged import Judged, Question

BLOCK_TOKENS = 32
CHUNK_TOKENS = 256
START_TOKENS = 32
# recent tokens that stay, as a share of the limit, as in the default configuration
RECENT_SHARE = 128 / 672


def eviction(limit_tokens: int, crush_blocks: int) -> Any:
    """Down to `limit_tokens`, of which KVCrush chooses `crush_blocks` blocks.

    KVCrush's blocks come on top of `max_cache_size`, so that is smaller by them.
    """
    recent = max(1, round(limit_tokens * RECENT_SHARE / BLOCK_TOKENS)) * BLOCK_TOKENS
    return genai.CacheEvictionConfig(
        start_size=START_TOKENS,
        recent_size=recent,
        max_cache_size=limit_tokens - crush_blocks * BLOCK_TOKENS,
        aggregation_mode=genai.AggregationMode.NORM_SUM,
        kvcrush_config=genai.KVCrushConfig(crush_blocks, genai.KVCrushAnchorPointMode.MEAN),
    )


def open_pipeline(job: dict[str, Any]) -> Any:
    """A pipeline in float32, keys and values too."""
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = job["pool_blocks"]
    scheduler.max_num_batched_tokens = CHUNK_TOKENS
    scheduler.enable_prefix_caching = False
    if job["limit_tokens"]:
        scheduler.use_cache_eviction = True
        scheduler.cache_eviction_config = eviction(job["limit_tokens"], job["crush_blocks"])
    properties = {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "INFERENCE_NUM_THREADS": job["threads"],
    }
    return genai.ContinuousBatchingPipeline(job["model"], scheduler, "CPU", properties)


def config_of(max_tokens: int) -> Any:
    config = genai.GenerationConfig()
    config.max_new_tokens = max_tokens
    config.do_sample = False
    config.ignore_eos = True
    config.apply_chat_template = False
    return config


def tensor_of(tokens: list[int]) -> Any:
    return ov.Tensor(np.array([tokens], dtype=np.int64))


def write_freely(pipe: Any, question: Question) -> list[int]:
    """The likeliest tokens, as many as the right answer has."""
    config = config_of(len(question.told))
    (result,) = pipe.generate([tensor_of(question.prompt)], [config])
    return list(result.m_generation_ids[0])


def force(pipe: Any, question: Question) -> list[float]:
    """Log-probabilities of the right answer's tokens.

    Raises:
        RuntimeError: the text was written in other tokens.
    """
    config = config_of(len(question.told))
    config.logprobs = 1
    text = pipe.get_tokenizer().decode(question.told)
    # its expressions know no escaped space
    pattern = re.escape(text).replace("\\ ", " ")
    config.structured_output_config = genai.StructuredOutputConfig(regex=pattern)
    handle = pipe.add_request(0, tensor_of(question.prompt), config)
    while pipe.has_non_finished_requests():
        pipe.step()
    (output,) = handle.read_all()
    if list(output.generated_ids) != question.told:
        raise RuntimeError(f"{output.generated_ids} were written, not {question.told}")
    return list(output.generated_log_probs)


def ask(pipe: Any, question: Question, pool_blocks: int) -> Judged:
    """Force the right answer; where that leaves it open what is likeliest, ask freely too."""
    logprobs = force(pipe, question)
    metrics = pipe.get_metrics()
    # in per cent, of the last request and of its last step
    peak, kept = (
        usage / 100 * pool_blocks * BLOCK_TOKENS
        for usage in (metrics.max_cache_usage, metrics.cache_usage)
    )
    # what has more than half of the probability is the likeliest
    sure = all(logprob > math.log(0.5) for logprob in logprobs)
    likeliest = question.told if sure else write_freely(pipe, question)
    return judge(question, likeliest, logprobs, peak, kept)


def main() -> None:
    job = read_job()
    pipe = open_pipeline(job)
    judged = [ask(pipe, question, job["pool_blocks"]) for question in job["questions"]]
    answer([{"name": job["name"], "share": job["share"], "judged": judged}])


if __name__ == "__main__":
    main()
