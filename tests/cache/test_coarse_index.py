"""An index whose entries speak for several tokens, on the worker's half without a model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.cache.client import Client
from tests.cache.test_recall import HEADS, NUMBERS, RECALL, RecallLab, run
from vllm_budgetkv.arithmetic.quota import Quota
from vllm_budgetkv.policy import PolicyOptions


class LongLab(RecallLab):
    max_tokens = 1120


@pytest.mark.parametrize(("max_index_share", "entry_tokens"), [(0.5, 1), (0.1, 2), (0.05, 4)])
def test_an_index_is_as_coarse_as_its_share_demands(
    max_index_share: float, entry_tokens: int
) -> None:
    """The lab checks in every step that what stands there is of the prompt and is attended to."""
    quota = Quota(**NUMBERS, recall=replace(RECALL, max_index_share=max_index_share))
    options = PolicyOptions(probe_tokens=4, retrieval_ratio=1.0)
    sizes = {"pool_blocks": 30, "heads": HEADS, "tier_blocks": 200}
    lab = LongLab("hybrid", quota, options=options, **sizes)
    client = run(lab, Client("long", 1100), outputs=12)
    slot = lab.state(client).slot
    recalls = lab.recaller.num_tokens[slot] > 0
    assert (lab.recaller.entry_tokens[slot][recalls] == entry_tokens).all()
    num_pages = (lab.recaller.index[slot] >= 0).sum(dim=-1)[recalls]
    assert (num_pages == -(-1099 // RECALL.index_tokens(entry_tokens))).all()
    assert lab.num_checked and int(lab.recaller.moved[slot].sum()) > 0
    lab.step({}, finished=("long",))
