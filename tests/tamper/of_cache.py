"""What is broken on purpose where the bytes are: cache and ops."""

from __future__ import annotations

from tests.tamper.mutation import Mutation

COMPACT = "        tables.is_static[slot, rows] = is_static\n"

OF_CACHE = (
    Mutation(
        "rotaries: unknown is taken for none",
        "cache/probe/rotaries.py",
        "if not unknown or (",
        "if True or (",
    ),
    Mutation(
        "rotaries: noise excuses everything",
        "cache/probe/rotaries.py",
        "min(2 * self.noise, rounding)",
        "2 * self.noise",
    ),
    Mutation(
        "rotaries: only a long batch is looked at",
        "cache/probe/rotaries.py",
        "for wanted in (long, SHORT):",
        "for wanted in (long, long):",
    ),
    Mutation(
        "start: warm-up requests are reported",
        "cache/report.py",
        "if self.is_paused or (self.on_finished is None and self.traces is None):",
        "if self.on_finished is None and self.traces is None:",
    ),
    Mutation(
        "rehearsal: keeps its slot",
        "cache/rehearsal.py",
        "    slots.end(REQUEST_ID)\n",
        "",
    ),
    Mutation(
        "rehearsal: ends before heads are long",
        "cache/rehearsal.py",
        "range(-(-longest_tokens // quota.chunk_tokens) + 1)",
        "range(4)",
    ),
    Mutation(
        "step: a model that runs without our metadata passes",
        "cache/cache.py",
        "if self.plans and self.step is None:",
        "if False:",
    ),
    Mutation(
        "compressor: two heads' tables swapped",
        "cache/compressor.py",
        COMPACT,
        COMPACT + "        heads.table[[0, -1]] = heads.table[[-1, 0]].clone()\n",
    ),
    Mutation(
        "compressor: contrast negated",
        "cache/compressor.py",
        "ops.contrast(heads, longest_tokens)",
        "-ops.contrast(heads, longest_tokens)",
    ),
    Mutation(
        "compressor: the mean where the policy takes the largest",
        "cache/compressor.py",
        "            policy.takes_largest,\n",
        "            False,\n",
    ),
    Mutation(
        "compressor: scores negated",
        "cache/compressor.py",
        "ops.select(scores,",
        "ops.select(-scores,",
    ),
    Mutation(
        "compressor: a page freed twice",
        "cache/compressor.py",
        COMPACT,
        COMPACT
        + "        free_pages, num_free = tables.stack_of(slot)\n"
        + "        free_pages[num_free] = free_pages[num_free - 1]\n"
        + "        num_free += 1\n",
    ),
    Mutation(
        "compressor: positions renumbered",
        "cache/compressor.py",
        COMPACT,
        COMPACT
        + "        page, size = heads.table[0, 1].long(), heads.page_tokens\n"
        + "        heads.pool.positions[page] = torch.arange(size).int() + size\n",
    ),
    Mutation(
        "compressor: poison skipped",
        "cache/compressor.py",
        "tables.stack_of(slot), poison=self.poison)",
        "tables.stack_of(slot), poison=False)",
    ),
    Mutation(
        "compressor: poison skipped and a stale token read",
        "cache/compressor.py",
        "tables.stack_of(slot), poison=self.poison)\n",
        "tables.stack_of(slot), poison=False)\n"
        + "        heads.lens.add_((heads.lens % heads.page_tokens > 0).int())\n",
    ),
    Mutation(
        "compressor: digests not made",
        "cache/compressor.py",
        "            ops.digest(heads)\n",
        "",
    ),
    Mutation(
        "compressor: one layer is not compressed before decode",
        "cache/compressor.py",
        "self.compress(request, range(self.tables.num_layers), 0",
        "self.compress(request, range(self.tables.num_layers - 1), 0",
    ),
    Mutation(
        "slots: the look-ahead's seed is ignored",
        "cache/probe/probes.py",
        "return seed.copy() if seed is not None else None",
        "return None",
    ),
    Mutation(
        "slots: the seed is not copied",
        "cache/probe/probes.py",
        "return seed.copy() if seed is not None else None",
        "return seed",
    ),
    Mutation(
        "slots: a preempted request keeps its slot",
        "cache/slots.py",
        "            self._release(request_id, is_preempted=True)\n        if places",
        "            pass\n        if places",
    ),
    Mutation(
        "tables: identity pages off by one",
        "arithmetic/layout.py",
        "(by_head + (block_ids * self.stride_pages)[:, None])",
        "(by_head + (block_ids * self.stride_pages)[:, None] + 1)",
    ),
    Mutation(
        "tables: a grown request's blocks off by one",
        "cache/tables.py",
        "start = self.pages_of(blocks), first_block * self.blocks.head_pages",
        "start = self.pages_of(blocks), (first_block + (first_block > 0)) * self.blocks.head_pages",
    ),
    Mutation(
        "tables: the first free page is lost when a request turns to shared",
        "cache/tables.py",
        "self.num_free[slot] = free.numel()",
        "self.num_free[slot] = max(0, free.numel() - 1)",
    ),
    Mutation(
        "tables: classes outlive their request",
        "cache/tables.py",
        "        self.is_static[slot] = True\n",
        "",
    ),
    Mutation(
        "ledger: one block more than the quota passes",
        "cache/ledger.py",
        "if len(blocks) > quota_blocks:",
        "if len(blocks) > quota_blocks + 1:",
    ),
    Mutation(
        "bank: the ring overwrites the wrong place",
        "cache/probe/bank.py",
        "(self.num_written + i) % self.capacity",
        "(self.num_written + i + 1) % self.capacity",
    ),
    Mutation(
        "bank: queries turned the wrong way",
        "cache/probe/bank.py",
        "turned = rotate(turned, wanted - position,",
        "turned = rotate(turned, position - wanted,",
    ),
    Mutation(
        "step: the probe asks in front of the chunk",
        "cache/step.py",
        "        last = largest.max()\n",
        "        last = largest.min() - 1\n",
    ),
    Mutation(
        "step: pages without a digest compete",
        "cache/reading.py",
        "max(grown_pages, options.retrieval_window_pages(page_tokens))",
        "options.retrieval_window_pages(page_tokens)",
    ),
    Mutation(
        "step: prefill rows retrieve",
        "cache/step.py",
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
        "cache/compressor.py",
        "mode = kept[0].merge",
        "mode = None",
    ),
    Mutation(
        "compressor: what stays is merged into what goes",
        "cache/compressor.py",
        "ops.merge(part, heads",
        "ops.merge(~part, heads",
    ),
    Mutation(
        "vision: time stamps count as frames",
        "cache/vision.py",
        "if mask is None:",
        "if True:",
    ),
    Mutation(
        "vision: frames of another size belong to those before",
        "cache/vision.py",
        "length = min(stop - start, run_tokens)",
        "length = stop - start",
    ),
    Mutation(
        "vision: frames may be fewer than none",
        "cache/vision.py",
        "or min(numbers) < 1:",
        "or False:",
    ),
    Mutation(
        "spans: items overlap",
        "cache/spans.py",
        "        free = stop\n",
        "",
    ),
    Mutation(
        "report: half a line stays",
        "cache/report_file.py",
        "os.ftruncate(file, size_bytes)",
        "pass",
    ),
    Mutation(
        "report: waits for the reader of a pipe",
        "cache/report_file.py",
        " | os.O_NONBLOCK",
        "",
    ),
    Mutation(
        "step: a reserved page is taken again",
        "cache/cache.py",
        "            rows.shared.zero_()\n",
        "",
    ),
    Mutation(
        "step: a decoded query one position off",
        "cache/probe/probes.py",
        "position = request.position_offset + request.computed_tokens",
        "position = request.position_offset + request.computed_tokens + 1",
    ),
    Mutation(
        "step: a decode step allocates",
        "cache/reading.py",
        "slots=self.numbers[:num_rows])",
        "slots=self.numbers[:num_rows].clone())",
    ),
    Mutation(
        "cache: a prompt near its quota gives the queries of its last chunk only",
        "cache/probe/probes.py",
        "near_tokens = max(stop_tokens, request.prompt_tokens)",
        "near_tokens = stop_tokens",
    ),
    Mutation(
        "recall: pages are taken and stay free",
        "cache/tables.py",
        "        self.num_free[slot] -= count\n",
        "",
    ),
    Mutation(
        "recall: what is held may come back a second time",
        "cache/recaller.py",
        "            ops.mark(slot, self.tables.layer(layer), self.heads(layer))\n",
        "            ops.mark(slot, self.tables.layer(layer), self.heads(0))\n",
    ),
    Mutation(
        "recall: the broad heads",
        "cache/recaller.py",
        ".flatten().topk(self.plan.num_heads)",
        ".flatten().neg().topk(self.plan.num_heads)",
    ),
    Mutation(
        "recall: pages stay in front when they are taken away",
        "cache/tables.py",
        "        self.lens[slot] -= num_tokens\n",
        "",
    ),
    Mutation(
        "recall: heads keep all of the budget beside what comes back",
        "arithmetic/recall.py",
        "resident_tokens=budget_tokens - taken_tokens",
        "resident_tokens=budget_tokens",
    ),
)
