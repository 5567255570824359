"""The true question as the probe: what a policy keeps when it knows what will be asked, and where.

A look-ahead asks the question before the video is seen, so its queries have not read the video. The
oracle's have: they are those of a run on the full cache. What the oracle answers and the look-ahead
does not is lost by the probe; what both lose is lost by the policy or by the quota.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.quality.inside import PrefillRecorder, before_admission, client_number, closing
from benchmarks.quality.lab import Lab
from vllm_budgetkv.cache.probe.bank import BankShape, ProbeBank
from vllm_budgetkv.policy import POLICIES
from vllm_budgetkv.policy.probe_source import PromptText
from vllm_budgetkv.start.config import BudgetConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm.v1.core.sched.output import SchedulerOutput

    from benchmarks.quality.inside import Prefill
    from benchmarks.quality.lab import Outcome, Setup
    from benchmarks.quality.suite import Example
    from vllm_budgetkv.cache.probe.probes import Probes


def ask_with_oracle(setup: Setup, examples: Sequence[Example]) -> list[Outcome]:
    """Answers of a compressing engine whose probe is the real question.

    Runs the examples twice, in two engines one after the other: on the full cache for the queries,
    then under the quota with these queries in the place of the look-ahead's. There they are turned
    to the end of each chunk as any probe is, and the question's own queries follow them once it is
    reached.

    Args:
        setup: of the compressing engine.
        examples: what to ask; all their queries are held in memory.

    Raises:
        ValueError: the policy of `setup` does not score by the text of the prompt.
    """
    banks = question_banks(setup, examples)
    lab = Lab(replace(setup, budget=setup.budget | {"lookahead": False}))
    with closing(lab), before_admission(lab, seeding(lab, banks)):
        return lab.ask(examples)


def question_banks(setup: Setup, examples: Sequence[Example]) -> list[ProbeBank]:
    """Queries of the last text tokens of each prompt, computed with the whole prompt in the cache.

    Args:
        setup: of the compressing engine; says how many queries a probe has.
        examples: whose questions.

    Returns:
        A bank per example, as a look-ahead would leave it.

    Raises:
        ValueError: the policy of `setup` does not score by the text of the prompt.
    """
    config = BudgetConfig.from_mapping(setup.budget)
    policy = POLICIES[config.policy]
    if not policy.needs_scores or policy.probe_source is not PromptText:
        raise ValueError(
            f"policy {config.policy} does not score by the text of the prompt, so an oracle cannot "
            "ask in its place: choose a policy whose probe_source is PromptText"
        )
    lab = Lab(replace(setup, budget={"policy": "full"}))
    with (
        closing(lab),
        PrefillRecorder(
            lab,
            lambda spans: spans.last_text_positions(0, spans.prompt_tokens, config.probe_tokens),
        ) as recorder,
    ):
        lab.ask(examples)
    return [bank_of(prefill, config.probe_tokens) for prefill in recorder.prefills()]


def bank_of(prefill: Prefill, capacity: int) -> ProbeBank:
    """A bank that holds the recorded queries, oldest first."""
    num_layers, num_queries, num_query_heads, head_size = prefill.queries.shape
    queries = prefill.queries
    shape = BankShape(num_layers, num_query_heads, head_size, queries.dtype, queries.device)
    bank = ProbeBank(shape, capacity)
    write = bank.plan_write(list(range(num_queries)))
    bank.write_positions(write, prefill.rotary_positions)
    for layer in range(num_layers):
        bank.write_queries(write, layer, prefill.queries[layer])
    return bank


def seeding(lab: Lab, banks: Sequence[ProbeBank]) -> Callable[[Probes, SchedulerOutput], None]:
    """What gives the next requests of a lab these banks as seeds, one each, in the order of asking.

    For `before_admission`.
    """
    first = lab.llm.request_counter.counter

    def seed(probes: Probes, scheduled: SchedulerOutput) -> None:
        for new in scheduled.scheduled_new_reqs:
            probes.seed(new.req_id, banks[client_number(new.req_id) - first])

    return seed
