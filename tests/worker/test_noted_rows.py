"""Rows of a batch that Model Runner V2 prepares for a model with recurrent layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm_budgetkv.worker.noted_rows import NotedRows


def test_the_rows_of_the_batch_at_hand() -> None:
    """They are noted before metadata are built, and what builds them gets what it got."""
    seen: list[tuple[Any, ...]] = []
    state = SimpleNamespace(prepare_attn=lambda *args, **kwargs: seen.append((args, kwargs)) or "m")
    rows = NotedRows()
    rows.watch(SimpleNamespace(model_state=state))
    for ids in (["a", "b"], ["b"]):
        batch = SimpleNamespace(req_ids=ids)
        assert state.prepare_attn(batch, 1, for_capture=False) == "m"
        assert rows.ids == ids
        assert seen.pop() == ((batch, 1), {"for_capture": False})
