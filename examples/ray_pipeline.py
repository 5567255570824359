"""A file of conversations through Ray Data: the answers as a data set.

python examples/ray_pipeline.py ROWS.jsonl OUT_DIR WORKERS MODEL [options of vllm serve]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray

from vllm_budgetkv.batch.answerer import Answerer
from vllm_budgetkv.batch.rows import Row, as_item, index


def held(row: dict[str, str]) -> dict[str, object]:
    answer = json.loads(row["answer"])
    body = answer["response"]["body"] or {}
    report = (body.get("kv_transfer_params") or {}).get("budgetkv") or {}
    return {
        "custom_id": answer["custom_id"],
        "text": body["choices"][0]["message"]["content"] if body else None,
        "error": answer["error"] and answer["error"]["message"],
        "held_blocks": report.get("peak_blocks"),
    }


def main() -> None:
    path, out, workers, *of_server = sys.argv[1:]
    rows = [as_item(row) for row in index(Path(path)) if isinstance(row, Row)]
    answers = ray.data.from_items(rows).map_batches(
        Answerer,
        fn_constructor_args=(str(Path(path).absolute()), of_server),
        batch_size=32,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=int(workers)),
        num_gpus=float(ray.cluster_resources().get("GPU", 0) > 0),
    )
    answers.map(held).write_json(out)


if __name__ == "__main__":
    ray.init()
    main()
