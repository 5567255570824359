"""A lab whose queries, keys and values depend on the request and the position alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tests.cache.client import Client, Feature, parent_of
from tests.cache.lab import Lab
from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.cache.probe.rotation import rotate
from vllm_budgetkv.policy import PolicyOptions

if TYPE_CHECKING:
    import pytest

    from vllm_budgetkv.cache.step import Step

MAX_TOKENS = 640
STRENGTH = 9.0
"""Norm of what the needle's keys and the asking queries share: 0.9 of the attention or more."""

BLOCKS = 12
NUMBERS = {"page_tokens": 8, "num_layers": 3, "chunk_tokens": 24, "decode_interval_tokens": 8}
SMALL = {"sink_tokens": 2, "window_tokens": 8, "probe_tokens": 4}


def small_quota(**changes: Any) -> Quota:
    return Quota(**{"blocks": BLOCKS, **NUMBERS, **changes})


def options(**changes: Any) -> PolicyOptions:
    return PolicyOptions(**{**SMALL, **changes})


def video_client(name: str = "video", prompt_tokens: int = 480, text_tokens: int = 6) -> Client:
    """Text, a video of frames of 4 tokens, text."""
    video = Feature(text_tokens, prompt_tokens - 2 * text_tokens, 4)
    return Client(name, prompt_tokens, [video])


class Scripted(Lab):
    """The same tokens in the same order have the same projections, whatever else the engine does.

    Keys and queries are rotated to their positions. The rotation is slow enough that a direction in
    the last pairs of elements still matches at the far end of the prompt.
    """

    rope_base = 1e7

    def __init__(self, policy: str, quota: Quota, **kwargs: Any) -> None:
        super().__init__(policy, quota, **kwargs)
        source = torch.Generator().manual_seed(7)
        shape = (self.layers, 3, MAX_TOKENS, self.heads * self.group, self.head_size)
        # query, key, value; keys and values use the first `heads` only
        self.script = torch.randn(shape, generator=source)
        self.outputs: dict[str, list[torch.Tensor]] = {}
        self.steps: list[Step] = []

    def place_in_script(self, client: Client, index: torch.Tensor) -> torch.Tensor:
        """Which of the scripted tokens the tokens `index` of a client are."""
        return index

    def project(
        self, client: Client, layer: int, first: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index = torch.arange(first, first + count)
        query, key, value = self.script[layer][:, self.place_in_script(client, index)]
        rotary = self.rotary
        query, key = (rotate(x, index, rotary.inv_freq, rotary.is_neox) for x in (query, key))
        return query, key[:, : self.heads].contiguous(), value[:, : self.heads].contiguous()

    def see(self, client: Client, layer: int, out: torch.Tensor) -> None:
        self.outputs.setdefault(client.request_id, []).append(out.clone())

    def forward(self, work: dict[Client, int]) -> Step:
        step = super().forward(work)
        self.steps.append(step)
        return step

    def run(self, client: Client, outputs: int, chunk_tokens: int | None = None) -> Client:
        """Prefill in chunks and decode until the client has so many output tokens."""
        chunk_tokens = chunk_tokens or self.quota.chunk_tokens
        while client.output_tokens < outputs:
            self.step({client: min(chunk_tokens, self.room(client))})
        return client

    def slot(self, client: Client) -> int:
        return self.cache.slots.requests[client.request_id].slot


class Haystack(Scripted):
    """One vision token, the needle, has keys that the queries of the asking tokens match.

    They meet in the slow pairs of elements, which are empty everywhere else, so to tokens that do
    not ask the needle is a token like any other. A look-ahead runs its parent's text tokens.

    Args:
        needle: position of the needle.
        asking: positions of the text tokens whose queries match it.
    """

    def __init__(
        self, policy: str, quota: Quota, *, needle: int, asking: list[int], **kwargs: Any
    ) -> None:
        super().__init__(policy, quota, **kwargs)
        self.needle = needle
        is_slow = torch.arange(self.head_size) % (self.head_size // 2) >= 3 * self.head_size // 8
        self.script[:, :2, ..., is_slow] = 0
        source = torch.Generator().manual_seed(8)
        direction = torch.randn(self.layers, self.heads, self.head_size, generator=source) * is_slow
        direction *= STRENGTH / direction.norm(dim=-1, keepdim=True)
        queries, keys = self.script[:, 0], self.script[:, 1]
        queries[:, asking] += direction.repeat_interleave(self.group, dim=1)[:, None]
        keys[:, needle, : self.heads] += direction

    def place_in_script(self, client: Client, index: torch.Tensor) -> torch.Tensor:
        parent_id = parent_of(client.request_id)
        return index if parent_id is None else self.text_of_parent[index]

    def look_ahead(self, parent: Client, ahead: Client) -> None:
        """Run the text of `parent` as `ahead`."""
        positions = torch.arange(parent.prompt_tokens)
        for item in parent.features:
            inside = (positions >= item.offset) & (positions < item.offset + item.length)
            positions = positions[~inside]
        self.text_of_parent = positions
        ahead.prompt_tokens = len(positions)
        self.step({ahead: len(positions)})
        self.give_blocks(ahead)
        self.step({}, finished=(ahead.request_id,))

    def heads_with_needle(self, client: Client) -> int:
        """(layer, head) pairs that hold the needle."""
        return sum(
            self.needle in self.held(client, layer, head).tolist()
            for layer in range(self.layers)
            for head in range(self.heads)
        )


def watch_free_pages(monkeypatch: pytest.MonkeyPatch, lab: Scripted, client: Client) -> list[int]:
    """Free head-pages of a shared client at the worst moment of every layer: after its append."""
    seen: list[int] = []
    attend = ops.attend

    def spy(*args: Any) -> None:
        request = lab.cache.slots.requests[client.request_id]
        if request.shared:
            seen.append(int(lab.cache.tables.num_free[request.slot]))
        attend(*args)

    monkeypatch.setattr(ops, "attend", spy)
    return seen
