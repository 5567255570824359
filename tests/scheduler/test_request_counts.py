"""What vLLM learns when it counts requests while it schedules."""

from __future__ import annotations

import pytest

from vllm_budgetkv.scheduler.scheduler import BudgetScheduler


def make_scheduler(num_running: int, num_waiting: int, *, scheduling: bool) -> BudgetScheduler:
    """A scheduler with requests and nothing else, over vLLM's own count."""
    scheduler = object.__new__(BudgetScheduler)
    scheduler.running = [None] * num_running
    scheduler.waiting = [None] * num_waiting
    scheduler.kv_holding_waiting = []
    scheduler.requests, scheduler._held = {}, {}
    scheduler._scheduling = scheduling
    return scheduler


@pytest.mark.parametrize(("num_running", "num_waiting"), [(0, 1), (1, 0), (3, 2)])
def test_no_request_is_alone_while_scheduling(num_running: int, num_waiting: int) -> None:
    """vLLM lifts `long_prefill_token_threshold` for a single one, in the sum of both counts."""
    counts = make_scheduler(num_running, num_waiting, scheduling=True).get_request_counts()
    assert sum(counts) == num_running + num_waiting + 1 > 1


@pytest.mark.parametrize(("num_running", "num_waiting"), [(0, 0), (1, 0), (2, 3)])
def test_no_request_waits_that_is_not_there(num_running: int, num_waiting: int) -> None:
    """One was said to wait always: vLLM took the pool for full and never held a prefill back, so
    that `--prefill-schedule-interval` did nothing."""
    counts = make_scheduler(num_running, num_waiting, scheduling=True).get_request_counts()
    assert counts[1] == num_waiting


def test_between_two_steps_the_count_is_true() -> None:
    assert make_scheduler(2, 3, scheduling=False).get_request_counts() == (2, 3)
