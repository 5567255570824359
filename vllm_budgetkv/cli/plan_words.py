"""What a plan means, in sentences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_budgetkv.cli.figures import size_text
from vllm_budgetkv.cli.serve_line import serve_arguments
from vllm_budgetkv.policy.option import flag_of
from vllm_budgetkv.start import layer_kinds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_budgetkv.cli.plan import Plan


# the smallest share of the tokens in the tables of README.md
LEAST_MEASURED_SHARE = 0.05


def heading(plan: Plan) -> str:
    """The model as the count sees it."""
    engine, name = plan.engine, plan.wishes.model
    model, parallel = engine.model_config, engine.parallel_config
    gpus = parallel.tensor_parallel_size
    dtype = str(model.dtype).removeprefix("torch.")
    spread = f", on each of {gpus} GPUs" if gpus > 1 else ""
    elements, value_size = model.get_head_size(), layer_kinds.value_size(model)
    heads = f"{elements} with values of {value_size}" if value_size != elements else f"{elements}"
    return (
        f"{Path(name).name if Path(name).is_dir() else name}: {plan.quota.num_layers} layers of "
        f"{model.get_num_kv_heads(parallel)} KV heads of {heads}, {dtype}{spread}"
    )


def results(plan: Plan) -> Iterator[tuple[str, str]]:
    """What was chosen, what it costs, and whether what was asked for fits."""
    quota, tokens = plan.quota, plan.tokens
    if not plan.choice.is_needed:
        yield "Quota", plan.choice.reason
        return
    if not plan.choice.config.compresses:
        yield "Quota", plan.choice.reason
        yield "Requests", _requests(plan)
        return
    said = "suggested, " if plan.choice.is_suggested else ""
    blocks = f"{quota.blocks:,} blocks of {quota.page_tokens} tokens"
    yield "Quota", f"{blocks}: {said}{plan.choice.reason}"
    if quota.fits(tokens):
        yield "Compression", f"none: the quota holds all {tokens:,} tokens"
    else:
        share = plan.kept_tokens / tokens
        yield "Compression", f"{100 * share:.1f} % of {tokens:,} tokens stay, per head on average"
    yield "Requests", _requests(plan)


def _requests(plan: Plan) -> str:
    ours, stock, wanted = plan.cost.at_once, plan.stock.at_once, plan.wishes.concurrency
    if ours is None or stock is None:
        needed = wanted * plan.cost.num_bytes, wanted * plan.stock.num_bytes
        return (
            f"{wanted:,} at once need {size_text(needed[0])} of KV cache, {size_text(needed[1])} "
            "if it is full"
        )
    told = f"{ours:,} at once, {stock:,} in a full cache"
    if ours < wanted:
        return f"{told}; you want {wanted:,}: the others wait, or lower the quota"
    if stock >= wanted:
        return f"{told}: no quota is needed for {wanted:,}"
    return told


def notes(plan: Plan) -> Iterator[str]:
    """What a reader must know of the figures."""
    flags = {words[0] for words in serve_arguments(plan)}
    if plan.choice.is_needed and plan.kept_tokens < LEAST_MEASURED_SHARE * plan.tokens:
        yield (
            f"Answers were measured where {100 * LEAST_MEASURED_SHARE:g} % of the tokens stay or "
            "more (README, Measured): compare yours before use."
        )
    yield from _of_estimates(plan)
    if layer_kinds.pads_values(plan.engine.model_config):
        yield "Under a quota values take as much room as keys, which are longer."
    if plan.keeps_pool:
        yield (
            "With --skip-mm-profiling vLLM leaves no memory for the vision tower, so the line sets "
            "the pool."
        )
    if plan.encoder is not None and plan.encoder.whole_tokens is not None:
        yield (
            "Videos are computed in groups of frames if the model's tower proves right at start, "
            "so the encoder takes the same at any length; stock vLLM keeps whole videos."
        )
    if plan.encoder is not None and plan.encoder.unknown:
        yield from (f"Unknown: {reason}." for reason in plan.encoder.unknown)
        if plan.pool is not None and plan.pool.shares:
            yield "Nothing is kept free for what is unknown: raise --reserve by it."
    if plan.host is not None and plan.host.room is None and not plan.quota.fits(plan.tokens):
        yield (
            "Such a request is served without recall: the index of its prompt would take too much "
            "of its budget. Raise the quota."
        )
    if flag_of("unproven_device") in flags:
        yield (
            "No version was tested on a GPU yet: the server refuses one without "
            "--kv-unproven-device. Compare answers before use."
        )


def _of_estimates(plan: Plan) -> Iterator[str]:
    pool = plan.pool
    if pool is None or not pool.is_estimate:
        return
    for name, share in pool.shares.items():
        if share.origin == "estimate":
            yield f"Estimate of {name}: {share.source}."
    yield (
        "vLLM measures the pool when it starts, and a line of the log says then how many requests "
        "at quota fit."
    )
