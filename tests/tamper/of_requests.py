"""What is broken on purpose of what requests ask for, and of what their answers say."""

from __future__ import annotations

from tests.tamper.mutation import Mutation

OF_REQUESTS = (
    Mutation(
        "look-ahead: it runs without its request's adapter",
        "scheduler/lookahead.py",
        "        lora_request=parent.lora_request,\n",
        "",
    ),
    Mutation(
        "request: pinned tokens compete",
        "cache/compressor.py",
        "tiers=retention.tiers.masked_fill(is_pinned, Tier.PINNED)",
        "tiers=retention.tiers",
    ),
    Mutation(
        "request: pinned tokens take the place of chosen ones",
        "cache/compressor.py",
        "(retention.budgets + num_pinned).minimum(observation.lens)",
        "retention.budgets",
    ),
    Mutation(
        "request: pinned tokens cost nothing",
        "arithmetic/quota.py",
        "+ growth_tokens + self.page_tokens + self.pinned_tokens",
        "+ growth_tokens + self.page_tokens",
    ),
    Mutation(
        "request: the last position of a range is pinned too",
        "arithmetic/pinned.py",
        "return sum(min(stop, position) - start for",
        "return sum(min(stop + 1, position) - start for",
    ),
    Mutation(
        "request: more than the operator allows",
        "start/request_rules.py",
        "if not quota.min_blocks <= blocks <= self.most_blocks:",
        "if not quota.min_blocks <= blocks:",
    ),
    Mutation(
        "request: a misspelled key is ignored",
        "start/request_rules.py",
        "        if unknown:\n",
        "        if False:\n",
    ),
    Mutation(
        "request: what no front end refused is served by the server's terms",
        "scheduler/scheduler.py",
        "            self.encoder_cache_mismatch_reqs.add(request.request_id)\n"
        "            if request.sampling_params",
        "            if request.sampling_params",
    ),
    Mutation(
        "request: the full cache outgrows the pool",
        "scheduler/scheduler.py",
        "            request.max_tokens = min(request.max_tokens, room_tokens)\n",
        "",
    ),
    Mutation(
        "request: a look-ahead forgets what its parent asked for",
        "scheduler/lookahead.py",
        "extra_args=own(None if asked is None else asked.extra_args)",
        "extra_args=None",
    ),
    Mutation(
        "request: what another quota left is taken over",
        "scheduler/connector.py",
        "PromptKeys([(kind, key) for key in hashes], ends)",
        "PromptKeys(hashes, ends)",
    ),
    Mutation(
        "request: queries that never ran ahead are turned",
        "cache/probe/probes.py",
        "self.rotaries if request.policy.probe_source.runs_ahead else {}",
        "self.rotaries",
    ),
    Mutation(
        "request: all have the server's policy",
        "cache/slots.py",
        "policy=self._policies[arrival.terms.policy]",
        "policy=self.rules.offers[0].policy",
    ),
    Mutation(
        "answer: only the last compression counts",
        "cache/compressor.py",
        "request.retained_mass[rows] *= kept",
        "request.retained_mass[rows] = kept",
    ),
    Mutation(
        "answer: what is free is counted",
        "cache/summary.py",
        "is_vision = request.spans.lookup(positions)[1] & is_held",
        "is_vision = request.spans.lookup(positions)[1]",
    ),
    Mutation(
        "answer: the peak of before a preemption is forgotten",
        "scheduler/manager.py",
        "max(self.peak_blocks(request_id), held_blocks)",
        "held_blocks",
    ),
    Mutation(
        "answer: a client sees the message for the metrics",
        "metrics/message.py",
        "params.pop(KEY, None)",
        "params.get(KEY)",
    ),
    Mutation(
        "answer: metrics stay hidden once vLLM cleared its own",
        "metrics/meters.py",
        "        register(metric)\n",
        "        pass\n",
    ),
)
