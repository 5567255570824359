"""The methods of the literature in a real engine: inside the quota, each with its own answers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.e2e.engines import run_budgets, tokens_of
from tests.e2e.test_bound import ENGINE, budget, check_bound, mixed_requests

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

POLICIES = ["random", "snapkv", "ada-snapkv", "pyramidkv", "sparsemm", "keydiff"]
POLICIES += ["infinipot-v", "cords", "streammem"]


def test_every_baseline_stays_inside_the_quota(tmp_path: Path, vision_model: Path) -> None:
    """A long output and a long video under a ledger that is checked after every step."""
    scores_file = tmp_path / "scores.json"
    scores_file.write_text(json.dumps([[3, 1], [0, 1]]), encoding="utf-8")
    options = {"head_scores_file": str(scores_file), "template_tokens": 30, "probe_tokens": 8}
    budgets = [budget(policy, **options) for policy in POLICIES]
    requests = [mixed_requests()[index] for index in (0, 7)]
    answers = run_budgets(tmp_path, vision_model, requests, budgets, **ENGINE)
    assert list(answers) == POLICIES
    for policy, answer in answers.items():
        check_bound(answer)
        assert bool(answer["num_lookaheads"]) == (policy == "streammem")
        for request in requests:
            assert len(answer["answers"][request["name"]]["tokens"]) == request["max_tokens"]
    different = {json.dumps(tokens_of(answer)) for answer in answers.values()}
    assert len(different) == len(POLICIES), "two policies kept the same tokens"
