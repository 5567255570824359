"""An engine that starts as on a GPU and decodes from graphs serves what an eager one serves.

vLLM's Model Runner V2 decides which batches to replay, and pads them. The graph is a double, see
`tests.e2e.gpu_start`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.engines import run, tokens_of
from tests.e2e.test_bound import check_bound

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

# the first video has 94 tokens and is alone, so its last chunk is a batch of one token
CHUNK_TOKENS = 31
ENGINE = {"block_size": 8, "num_gpu_blocks_override": 40, "max_model_len": 512, "max_num_seqs": 4}
BUDGET = {
    "policy": "hybrid",
    "page_quota": 8,
    "chunk_tokens": CHUNK_TOKENS,
    "decode_interval_tokens": 4,
    "window_tokens": 4,
    "probe_tokens": 8,
    "force_class": "dynamic",
    "check_ledger": True,
}
REQUESTS: list[dict[str, Any]] = [
    {
        "name": "video",
        "content": [{"video": 22, "size_pixels": [84, 56]}, {"text": "Which?"}],
        "max_tokens": 24,
    },
    {
        "name": "other",
        "content": [{"video": 30, "size_pixels": [84, 56], "seed": 1}, {"text": "How many?"}],
        "max_tokens": 14,
        "arrives": 8,
    },
    {"name": "text", "content": [{"text": "Hi"}], "max_tokens": 20, "arrives": 9},
    # a step behind the others' end, so that their records are written
    {"name": "last", "content": [{"text": "End"}], "max_tokens": 2, "arrives": 40},
]
SAME = ("peak_blocks", "compressions", "kept", "heads", "output_tokens")


def serve(folder: Path, model: Path, **engine: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The engine's answer, and what the report says of each request."""
    folder.mkdir()
    report = folder / "report.jsonl"
    budget = BUDGET | {"report_file": str(report)}
    answer = run(folder, model, REQUESTS, budget=budget, runner="v2", **engine, **ENGINE)
    lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    # the engine adds a suffix to each name
    return answer, {
        line["request_id"].rpartition("-")[0]: {name: line[name] for name in SAME} for line in lines
    }


def test_graphs_change_nothing(tmp_path: Path, vision_model: Path) -> None:
    eager, expected = serve(tmp_path / "eager", vision_model)
    graphs, found = serve(tmp_path / "graphs", vision_model, starts_as_on_gpu=True)
    check_bound(graphs)
    assert eager["answers"]["video"]["prompt_tokens"] % CHUNK_TOKENS == 1
    assert tokens_of(graphs) == tokens_of(eager)
    assert found == expected
    assert set(found) == {"video", "other", "text"}, "no warm-up is a client's request"
    # three rows are padded to a graph of four
    assert set(graphs["replays"]) == {1, 2, 4}
