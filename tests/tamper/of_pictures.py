"""What is broken on purpose of pictures whose tokens attend both ways."""

from __future__ import annotations

from tests.tamper.mutation import Mutation

OF_PICTURES = (
    Mutation(
        "pictures: one that begins a chunk is cut",
        "arithmetic/pictures.py",
        "return first if first > start_tokens else stop\n",
        "return first if first > start_tokens else stop_tokens\n",
    ),
    Mutation(
        "pictures: a step without room computes a part",
        "arithmetic/pictures.py",
        "return count if count <= num_tokens else 0",
        "return min(count, num_tokens)",
    ),
    Mutation(
        "pictures: the last token is not seen",
        "arithmetic/pictures.py",
        "= stop - 1 - position",
        "= max(0, stop - 2 - position)",
    ),
    Mutation(
        "pictures: what fits a quota is cut",
        "scheduler/scheduler.py",
        "whole_tokens(start, num_new_tokens, self._pictures.ahead(request, start))",
        "num_new_tokens",
    ),
    Mutation(
        "pictures: chunks are cut where a quota says",
        "scheduler/chunks.py",
        "return whole_stop(start_tokens, stop, pictures)",
        "return stop",
    ),
    Mutation(
        "pictures: what a session goes on with is not looked at",
        "scheduler/scheduler.py",
        "refusal or self._pictures.refusal(request.mm_features, self._quota_of(request))",
        "refusal",
    ),
    Mutation(
        "pictures: no token sees its picture",
        "cache/step.py",
        "ahead = None if self.ahead is None else self.ahead[:num_tokens]",
        "ahead = None",
    ),
    Mutation(
        "pictures: tokens behind rows that retrieve see those of others",
        "cache/reading.py",
        "None if ahead is None else ahead[split:]",
        "None if ahead is None else ahead[: len(ahead) - split]",
    ),
    Mutation(
        "pictures: longer ones than a window attend both ways",
        "start/pictures.py",
        "longest is None or each[1] - each[0] <= longest",
        "True",
    ),
)
