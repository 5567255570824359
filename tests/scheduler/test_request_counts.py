"""How many requests run and wait: what vLLM's metrics and its data-parallel router are told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.request import RequestStatus

from vllm_budgetkv.scheduler.lookahead import Lookaheads
from vllm_budgetkv.scheduler.scheduler import BudgetScheduler


@pytest.mark.parametrize("num_ahead", [0, 1, 2])
def test_a_look_ahead_counts_as_its_waiting_parent(num_ahead: int) -> None:
    """And nothing else does: with one request more than there is, vLLM took the engine for full."""
    scheduler = object.__new__(BudgetScheduler)
    scheduler.running, scheduler.waiting = [None] * 3, [None] * 2
    scheduler.kv_holding_waiting = []
    scheduler.requests, scheduler.lookaheads = {}, Lookaheads()
    for number in range(num_ahead):
        ahead = SimpleNamespace(request_id=f"ahead{number}", status=RequestStatus.RUNNING)
        scheduler.requests[ahead.request_id] = ahead
        scheduler.lookaheads.hold(SimpleNamespace(request_id=f"client{number}"), ahead)
    assert scheduler.get_request_counts() == (3 - num_ahead, 2 + num_ahead)
