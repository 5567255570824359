"""What is broken on purpose of the prompts that host memory keeps."""

from __future__ import annotations

from tests.tamper.mutation import Mutation

OF_HOST = (
    Mutation(
        "host: a request keeps its blocks when it goes",
        "scheduler/prompts.py",
        "        self.blocks.release(kept.blocks)\n",
        "",
    ),
    Mutation(
        "host: what is taken can still be found",
        "arithmetic/host_blocks.py",
        "                del self._places[key]\n",
        "                pass\n",
    ),
    Mutation(
        "host: a block in use is given away",
        "arithmetic/host_blocks.py",
        "            self._unheld.pop(block, None)\n",
        "",
    ),
    Mutation(
        "host: the longest unheld goes last",
        "arithmetic/host_blocks.py",
        "self._unheld.popitem(last=False)[0]",
        "self._unheld.popitem()[0]",
    ),
    Mutation(
        "streaming: parts of a prompt are added without their weight",
        "cache/streaming.py",
        "            mean *= (weight - both).exp_()[..., None]\n",
        "",
    ),
    Mutation(
        "streaming: a piece is a page longer than there is room",
        "arithmetic/quota.py",
        "return growth_tokens // self.page_tokens",
        "return growth_tokens // self.page_tokens + 1",
    ),
    Mutation(
        "streaming: the question does not begin behind the last picture",
        "arithmetic/recall.py",
        "return end_of_vision or max(0,",
        "return max(0,",
    ),
    Mutation(
        "streaming: classes of the look-ahead have a say in the choice",
        "cache/requests.py",
        "        self.first_compression = self.compressions\n",
        "",
    ),
    Mutation(
        "host: what is not written yet can be found",
        "scheduler/prompts.py",
        "(kept.num_published + 1) * self.page_tokens <= seen_tokens",
        "kept.num_published * self.page_tokens <= seen_tokens",
    ),
    Mutation(
        "host: the end of an item before it is written",
        "scheduler/prompts.py",
        "ends[kept.num_ends].stop_tokens <= seen_tokens",
        "ends[kept.num_ends].stop_tokens <= seen_tokens + self.page_tokens",
    ),
    Mutation(
        "host: nobody waits for what is being written",
        "scheduler/prompts.py",
        "return key in self._writers and self.is_running(self._writers[key])",
        "return False",
    ),
    Mutation(
        "host: the end of an item is named by its tokens alone",
        "scheduler/connector.py",
        "hash_block_tokens(self._hash, parent, tokens, extra_keys)",
        "hash_block_tokens(self._hash, parent, tokens, None)",
    ),
    Mutation(
        "host: whoever took over cached tokens holds blocks for them too",
        "scheduler/manager.py",
        "    def allocate_external_computed_blocks(",
        "    def allocate_external_blocks(",
    ),
    Mutation(
        "host: a prompt takes over the tokens that ask the cache",
        "scheduler/prompts.py",
        "prompt_tokens - probe_tokens)",
        "prompt_tokens)",
    ),
    Mutation(
        "host: what is taken over is found behind new weights",
        "scheduler/connector.py",
        "        self._prompts.forget_all()\n",
        "",
    ),
    Mutation(
        "replay: chunks are not compressed",
        "cache/replay.py",
        "return request.quota.compresses_after(stop_tokens, request.prompt_tokens)",
        "return False",
    ),
    Mutation(
        "replay: the lead is left out",
        "cache/step.py",
        "            self.lead.append(layer)\n",
        "            pass\n",
    ),
    Mutation(
        "replay: pages of the lead are free before it is there",
        "cache/requests.py",
        "return self.computed_tokens - self.lead_tokens",
        "return self.computed_tokens",
    ),
    Mutation(
        "replay: the probe stands where the chunk began",
        "cache/replay.py",
        "next_position = largest + 1",
        "next_position = largest * 0",
    ),
    Mutation(
        "replay: a layer has the room of the one in front of it",
        "arithmetic/replayed.py",
        "filled_tokens = (layer + 1) *",
        "filled_tokens = layer *",
    ),
    Mutation(
        "replay: heads grow beyond their tables",
        "arithmetic/replayed.py",
        "min(room_tokens, width_tokens - quota.max_head_tokens)",
        "room_tokens",
    ),
    Mutation(
        "replay: a preempted request is compressed where it was not before",
        "cache/replay.py",
        "request.host.found_tokens)",
        "request.host.num_tokens)",
    ),
    Mutation(
        "replay: what a preempted request wrote counts as found",
        "scheduler/connector.py",
        "replace(place, found_tokens=first)",
        "replace(place, found_tokens=num_external_tokens)",
    ),
    Mutation(
        "replay: a layer's heads are classed as if they had been",
        "cache/requests.py",
        "        self.compressions = compressions\n",
        "",
    ),
    Mutation(
        "tier: the beginning of a block is not copied",
        "cache/tier.py",
        "        self.tokens[target].copy_(staged, non_blocking=True)\n",
        "",
    ),
    Mutation(
        "tier: positions of a copied beginning are lost",
        "cache/tier.py",
        "        self.places[target, :num_tokens] = self.places[source, :num_tokens]\n",
        "",
    ),
    Mutation(
        "index: a long prompt is never coarser",
        "arithmetic/recall.py",
        "for entry_tokens in ENTRY_TOKENS:",
        "for entry_tokens in ENTRY_TOKENS[:1]:",
    ),
    Mutation(
        "index: one entry more than a page has room for",
        "arithmetic/index_page.py",
        "// entry_bits // 8 * 8",
        "// entry_bits // 8 * 8 + 8",
    ),
    Mutation(
        "index: entries of a slot's last request",
        "cache/recaller.py",
        "        self.entry_tokens[slot] = room.entry_tokens\n",
        "",
    ),
    Mutation(
        "index: a mean of neighbours counts the first alone",
        "ops/reference/encode.py",
        "            total = total + key\n",
        "            total = total + 0 * key\n",
    ),
    Mutation(
        "metrics: what came back is counted again and again",
        "scheduler/answers.py",
        "recalled, self._recalled = self._recalled, Recalled()",
        "recalled = self._recalled",
    ),
    Mutation(
        "metrics: bytes are told as tokens",
        "cache/report.py",
        "moved_bytes=moved_tokens * self.token_bytes",
        "moved_bytes=moved_tokens",
    ),
    Mutation(
        "index: tables are as wide as a short prompt needs",
        "arithmetic/recall.py",
        "budget_tokens - self._average(page_tokens), page_tokens)",
        "budget_tokens - self._average(9 * page_tokens), page_tokens)",
    ),
)
