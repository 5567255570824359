"""What is broken on purpose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """Replace `old`, which stands exactly once in `module`, by `new`."""

    name: str
    module: str
    old: str
    new: str


COMPACT = "        tables.is_static[slot, rows] = is_static\n"

MUTATIONS = (
    Mutation(
        "rotaries: unknown is taken for none",
        "worker/rotaries.py",
        "if not unknown or (",
        "if True or (",
    ),
    Mutation(
        "rotaries: noise excuses everything",
        "worker/rotaries.py",
        "min(2 * self.noise, rounding)",
        "2 * self.noise",
    ),
    Mutation(
        "rotaries: only a long batch is looked at",
        "worker/rotaries.py",
        "for wanted in (long, SHORT):",
        "for wanted in (long, long):",
    ),
    Mutation(
        "hybrid: the keys most like the others stay",
        "policy/unlike.py",
        "topk(count, dim=-1)",
        "topk(count, dim=-1, largest=False)",
    ),
    Mutation(
        "graphs: a chunk of one token counts as decode",
        "worker/graphs.py",
        "None if cache.has_chunks else uniform_tokens",
        "uniform_tokens",
    ),
    Mutation(
        "start: warm-up requests are reported",
        "worker/slots.py",
        "if self.has_clients and self.parent_of",
        "if self.parent_of",
    ),
    Mutation(
        "rehearsal: keeps its slot",
        "worker/rehearsal.py",
        "        slots.finish(REQUEST_ID)\n",
        "",
    ),
    Mutation(
        "rehearsal: ends before heads are long",
        "worker/rehearsal.py",
        "range(-(-longest_tokens // quota.chunk_tokens) + 1)",
        "range(4)",
    ),
    Mutation(
        "step: a model that runs without our metadata passes",
        "worker/cache.py",
        "if self.plans and self.step is None:",
        "if False:",
    ),
    Mutation(
        "look-ahead: the question brings the text in front of it",
        "scheduler/lookahead.py",
        "min(enough_tokens, limit_tokens)",
        "limit_tokens",
    ),
    Mutation(
        "quota: blocks_for gives one more",
        "quota.py",
        "self.page_tokens), self.blocks)",
        "self.page_tokens), self.blocks + 1)",
    ),
    Mutation(
        "quota: no room for partial pages",
        "quota.py",
        "self.decode_interval_tokens + self.page_tokens",
        "self.decode_interval_tokens",
    ),
    Mutation(
        "quota: compresses one token late in prefill",
        "quota.py",
        "return seen_tokens > self.budget_tokens",
        "return seen_tokens > self.budget_tokens + 1",
    ),
    Mutation(
        "quota: first compaction of decode one token late",
        "quota.py",
        "held_tokens + 1 > self.tokens",
        "held_tokens > self.tokens",
    ),
    Mutation(
        "quota: later compactions of decode one token late",
        "quota.py",
        "grown_tokens + 1 > self.decode_interval_tokens",
        "grown_tokens > self.decode_interval_tokens",
    ),
    Mutation(
        "manager: growth stops one block late",
        "scheduler/manager.py",
        "return min(num_tokens, self.quota_tokens)",
        "return min(num_tokens, self.quota_tokens + self.block_size)",
    ),
    Mutation(
        "manager: a long request takes a block too few",
        "scheduler/manager.py",
        "            return self.quota_tokens\n",
        "            return self.quota_tokens - self.block_size\n",
    ),
    Mutation(
        "manager: the bound is not asserted",
        "scheduler/manager.py",
        "if held_blocks > self.quota_blocks:",
        "if held_blocks > self.quota_blocks + 1:",
    ),
    Mutation(
        "manager: a private request publishes its blocks",
        "scheduler/manager.py",
        "if request.request_id in self._private:",
        "if request.request_id in ():",
    ),
    Mutation(
        "manager: a finished request is not forgotten",
        "scheduler/manager.py",
        "        self._whole_quota.discard(request_id)\n",
        "",
    ),
    Mutation(
        "compressor: two heads' tables swapped",
        "worker/compressor.py",
        COMPACT,
        COMPACT + "        table[[0, -1]] = table[[-1, 0]].clone()\n",
    ),
    Mutation(
        "compressor: contrast negated",
        "worker/compressor.py",
        "ops.contrast(pool, table, lens, longest_tokens)",
        "-ops.contrast(pool, table, lens, longest_tokens)",
    ),
    Mutation(
        "compressor: scores negated",
        "worker/compressor.py",
        "ops.select(scores,",
        "ops.select(-scores,",
    ),
    Mutation(
        "compressor: a page freed twice",
        "worker/compressor.py",
        COMPACT,
        COMPACT
        + "        top = int(stack[1])\n"
        + "        stack[0][top] = stack[0][top - 1]\n"
        + "        stack[1] += 1\n",
    ),
    Mutation(
        "compressor: positions renumbered",
        "worker/compressor.py",
        COMPACT,
        COMPACT
        + "        size = tables.pool.layout.page_tokens\n"
        + "        tables.pool.positions[table[0, 1].long()] = torch.arange(size).int() + size\n",
    ),
    Mutation(
        "compressor: poison skipped",
        "worker/compressor.py",
        "*stack, poison=self.poison)",
        "*stack, poison=False)",
    ),
    Mutation(
        "compressor: poison skipped and a stale token read",
        "worker/compressor.py",
        "*stack, poison=self.poison)\n",
        "*stack, poison=False)\n"
        + "        lens += (lens % tables.pool.layout.page_tokens > 0).int()\n",
    ),
    Mutation(
        "compressor: digests not made",
        "worker/compressor.py",
        "            ops.digest(tables.pool, table, lens)\n",
        "",
    ),
    Mutation(
        "compressor: one layer is not compressed before decode",
        "worker/compressor.py",
        "layers = range(self.tables.num_layers)",
        "layers = range(self.tables.num_layers - 1)",
    ),
    Mutation(
        "cache: the bank takes vision tokens",
        "worker/cache.py",
        "return spans.last_text_positions(start, stop, options.probe_tokens)",
        "return list(range(start, stop))[-options.probe_tokens :]",
    ),
    Mutation(
        "cache: text before the video replaces the look-ahead",
        "worker/cache.py",
        "start = max(start, spans.end_of_vision)",
        "pass",
    ),
    Mutation(
        "slots: the look-ahead's seed is ignored",
        "worker/slots.py",
        "if seed is not None:",
        "if seed is not None and not seed.size:",
    ),
    Mutation(
        "slots: the seed is not copied",
        "worker/slots.py",
        "request.bank = seed.copy()",
        "request.bank = seed",
    ),
    Mutation(
        "slots: a preempted request keeps its slot",
        "worker/slots.py",
        "    def _preempt(self, request_id: str) -> None:\n        self._release(request_id)\n",
        "    def _preempt(self, request_id: str) -> None:\n",
    ),
    Mutation(
        "tables: identity pages off by one",
        "worker/tables.py",
        "return (block_ids * heads_per_block + head[:, None]).view(",
        "return (block_ids * heads_per_block + (head[:, None] + 1) % heads_per_block).view(",
    ),
    Mutation(
        "tables: a grown request's blocks off by one",
        "worker/tables.py",
        "            stop = first_block + len(blocks)\n",
        "            first_block += first_block > 0\n"
        + "            stop = first_block + len(blocks)\n",
    ),
    Mutation(
        "tables: the first free page is lost when a request turns to shared",
        "worker/tables.py",
        "self.num_free[slot] = free.numel()",
        "self.num_free[slot] = max(0, free.numel() - 1)",
    ),
    Mutation(
        "tables: classes outlive their request",
        "worker/tables.py",
        "        self.is_static[slot] = True\n",
        "",
    ),
    Mutation(
        "ledger: one block more than the quota passes",
        "worker/ledger.py",
        "if len(blocks) > quota_blocks:",
        "if len(blocks) > quota_blocks + 1:",
    ),
    Mutation(
        "bank: the ring overwrites the wrong place",
        "worker/bank.py",
        "(self.num_written + i) % self.capacity",
        "(self.num_written + i + 1) % self.capacity",
    ),
    Mutation(
        "bank: queries turned the wrong way",
        "worker/bank.py",
        "distance = next_position + rank - self.positions[index]",
        "distance = self.positions[index] - next_position - rank",
    ),
    Mutation(
        "step: the probe asks in front of the chunk",
        "worker/step.py",
        "row_positions.max() + 1",
        "row_positions.min()",
    ),
    Mutation(
        "step: pages without a digest compete",
        "worker/step.py",
        "max(grown_pages, options.retrieval_window_pages(page_tokens))",
        "options.retrieval_window_pages(page_tokens)",
    ),
    Mutation(
        "step: prefill rows retrieve",
        "worker/step.py",
        "if plan.num_tokens != 1), len(plans))",
        "if plan.num_tokens < 1), len(plans))",
    ),
    Mutation(
        "merge: the pivot is the least like token",
        "ops/reference/merge.py",
        "cosines = unit @ unit.T",
        "cosines = -(unit @ unit.T)",
    ),
    Mutation(
        "merge: dropped tokens are pivots",
        "ops/reference/merge.py",
        "_find_pivots(keys, keep & held, modality)",
        "_find_pivots(keys, held, modality)",
    ),
    Mutation(
        "compressor: nothing is merged",
        "worker/compressor.py",
        "if retention.merge is not None:",
        "if retention.merge == '':",
    ),
    Mutation(
        "compressor: what stays is merged into what goes",
        "worker/compressor.py",
        "ops.merge(part, tables.pool",
        "ops.merge(~part, tables.pool",
    ),
    Mutation(
        "lookm: vision before text",
        "policy/lookm.py",
        "& ~observation.is_vision",
        "& observation.is_vision",
    ),
    Mutation(
        "units: merging is forgotten",
        "policy/units.py",
        "scores=scores, tiers=tiers, budgets=budgets)",
        "scores=scores, tiers=tiers, budgets=budgets, merge=None)",
    ),
    Mutation(
        "vision: time stamps count as frames",
        "vision.py",
        "if place.is_embed is None:",
        "if True:",
    ),
    Mutation(
        "step: a reserved page is taken again",
        "worker/step.py",
        "            rows.shared.zero_()\n",
        "",
    ),
    Mutation(
        "step: a decoded query one position off",
        "worker/step.py",
        "position = request.position_offset + request.computed_tokens",
        "position = request.position_offset + request.computed_tokens + 1",
    ),
    Mutation(
        "step: a decode step allocates",
        "worker/step.py",
        "own, starts = buffers.numbers[:num_rows]",
        "own, starts = buffers.numbers[:num_rows].clone()",
    ),
    Mutation(
        "scheduler: chunks end within frames",
        "scheduler/scheduler.py",
        "between_frames - start if between_frames > start else",
        "between_frames - start if between_frames < start else",
    ),
)
