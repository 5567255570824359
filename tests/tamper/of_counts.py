"""What is broken on purpose elsewhere: arithmetic, policies, scheduler, worker, start."""

from __future__ import annotations

from tests.tamper.mutation import Mutation

OF_COUNTS = (
    Mutation(
        "frame groups: text between two groups belongs to the second",
        "scheduler/frame_groups.py",
        "positions = place.is_embed.nonzero().flatten()",
        "positions = place.is_embed.nonzero().flatten() - 1",
    ),
    Mutation(
        "frame groups: each has its video whole",
        "scheduler/frame_groups.py",
        "start, whole = stop, None",
        "start = stop",
    ),
    Mutation(
        "frame groups: a tower that sees other frames is believed",
        "worker/frame_proof.py",
        "if not torch.equal(found[same], whole[same]):",
        "if found[same].shape != whole[same].shape:",
    ),
    Mutation(
        "frame groups: a video with sound among its frames is taken for one in groups",
        "start/frame_groups.py",
        "is_cut = in_groups and stands_alone(features, index)",
        "is_cut = in_groups",
    ),
    Mutation(
        "frame groups: what a session goes on with is not looked at",
        "scheduler/scheduler.py",
        "refusal = self.encoder_room.refusal_of_whole(request)",
        "refusal = None",
    ),
    Mutation(
        "frame groups: pixels that a prefix covered are never sent",
        "scheduler/stripped.py",
        "        if not due:\n",
        "        if True:\n",
    ),
    Mutation(
        "frame groups: one group keeps its whole batch",
        "worker/video_encoder.py",
        "return [rows.clone() for rows in found] if len(found) > 1 else found",
        "return found",
    ),
    Mutation(
        "frame groups: a frame larger than the encoder's room is asked for",
        "start/frame_groups.py",
        "if frames.frame_tokens > most_tokens:",
        "if frames.frame_tokens > 2 * most_tokens:",
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
        "look-ahead: the question brings the text in front of it",
        "scheduler/lookahead.py",
        "min(enough_tokens, limit_tokens)",
        "limit_tokens",
    ),
    Mutation(
        "quota: blocks_for gives one more",
        "arithmetic/quota.py",
        "self.block_tokens), self.blocks)",
        "self.block_tokens), self.blocks + 1)",
    ),
    Mutation(
        "quota: no room for partial pages",
        "arithmetic/quota.py",
        "+ growth_tokens + self.page_tokens + self.pinned_tokens",
        "+ growth_tokens + self.pinned_tokens",
    ),
    Mutation(
        "quota: compresses one token late in prefill",
        "arithmetic/quota.py",
        "or seen_tokens <= self.budget_tokens:",
        "or seen_tokens <= self.budget_tokens + 1:",
    ),
    Mutation(
        "quota: first compaction of decode one token late",
        "arithmetic/quota.py",
        "least_tokens = 0 if",
        "least_tokens = 1 if",
    ),
    Mutation(
        "quota: later compactions of decode one token late",
        "arithmetic/quota.py",
        "grown_tokens % self.decode_interval_tokens == 0",
        "grown_tokens % self.decode_interval_tokens == 1",
    ),
    Mutation(
        "quota: output that is computed again runs past a compaction",
        "arithmetic/quota.py",
        "min(longest, start_tokens - grown_tokens + self.decode_interval_tokens)",
        "min(longest, start_tokens + self.decode_interval_tokens)",
    ),
    Mutation(
        "quota: chunks do not begin again at multiples",
        "arithmetic/quota.py",
        "                longest -= start_tokens % self.chunk_tokens\n",
        "",
    ),
    Mutation(
        "manager: growth stops one block late",
        "scheduler/manager.py",
        "return blocks * expected.quota.block_tokens",
        "return (blocks + 1) * expected.quota.block_tokens",
    ),
    Mutation(
        "manager: a long request takes no more than it needs now",
        "scheduler/manager.py",
        "blocks_for(num_tokens, expected.prompt_tokens)",
        "blocks_for(num_tokens, 1)",
    ),
    Mutation(
        "manager: the bound is not asserted",
        "scheduler/manager.py",
        "if held_blocks > quota_blocks:",
        "if held_blocks > quota_blocks + 1:",
    ),
    Mutation(
        "manager: a private request publishes its blocks",
        "scheduler/manager.py",
        "if self._expected[request.request_id].is_private:",
        "if not self._expected[request.request_id]:",
    ),
    Mutation(
        "scheduler: a finished request is not forgotten",
        "scheduler/scheduler.py",
        "        self._manager.forget(request.request_id)\n",
        "",
    ),
    Mutation(
        "cache: the bank takes vision tokens",
        "policy/probe_source.py",
        "return places.last_text_positions(start, stop, options.probe_tokens)",
        "return list(range(start, stop))[-options.probe_tokens :]",
    ),
    Mutation(
        "cache: text before the video replaces the look-ahead",
        "policy/probe_source.py",
        "start = max(start, places.end_of_vision, end_tokens)",
        "pass",
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
        "generators: a chunk draws from a seed",
        "worker/generators.py",
        "if is_discarded[row]}",
        "if False}",
    ),
    Mutation(
        "scheduler: a chunk takes what is left of the batch",
        "scheduler/scheduler.py",
        "return chunk_tokens if num_new_tokens >= chunk_tokens else 0",
        "return min(num_new_tokens, chunk_tokens)",
    ),
    Mutation(
        "scheduler: a chunk takes what is left of the encoder",
        "scheduler/scheduler.py",
        "is_cut = found[1] < num_new_tokens",
        "is_cut = False",
    ),
    Mutation(
        "scheduler: a chunk that waits for the encoder holds on to its items",
        "scheduler/scheduler.py",
        "            self.encoder_cache_manager.free(request)\n",
        "",
    ),
    Mutation(
        "chunks: what can never be encoded at once is asked for",
        "scheduler/chunks.py",
        "or num_embeds > limits.embeds",
        "or num_embeds > 2 * limits.embeds",
    ),
    Mutation(
        "look-ahead: a cancelled parent runs",
        "scheduler/lookahead.py",
        "ahead_id = self.held.pop(parent_id, None)",
        "ahead_id = self.held.get(parent_id)",
    ),
)
