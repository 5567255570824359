"""What a profile shows of us: ranges with our name, the ops inside them."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

from tests.cache.client import Client, Feature
from tests.cache.lab import Lab
from tests.cache.test_scenarios import QUOTA
from vllm_budgetkv.arithmetic.quota import Quota


def test_a_profile_names_the_compression_and_its_ops() -> None:
    lab = Lab("hybrid", Quota(**QUOTA), pool_blocks=30)
    client = Client("r", 158, [Feature(4, 144, 4)])
    with profile(activities=[ProfilerActivity.CPU]) as found:
        while client.computed_tokens < client.prompt_tokens:
            lab.step({client: min(24, client.prompt_tokens - client.computed_tokens)})
    counts = {event.key: event.count for event in found.key_averages()}
    compressions = lab.state(client).compressions * lab.layers
    assert counts["budgetkv::compress"] == compressions > 0
    for op in ("score", "select", "compact"):
        assert counts[f"budgetkv::{op}"] == compressions
    assert counts["budgetkv::attend"] >= compressions
