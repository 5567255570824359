"""Rows for a batch: one question about every picture and video of a folder.

python examples/make_rows.py FOLDER "Who wins?" > questions.jsonl
vllm run-batch -i questions.jsonl -o answers.jsonl --model MODEL --allowed-local-media-path FOLDER
python -m vllm_budgetkv.ray questions.jsonl answers --model MODEL --allowed-local-media-path FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

KINDS = {".png": "image", ".jpg": "image", ".jpeg": "image", ".mp4": "video", ".mkv": "video"}


def main() -> None:
    folder, question = sys.argv[1:]
    for path in sorted(Path(folder).absolute().iterdir()):
        if kind := KINDS.get(path.suffix.lower()):
            item = {"type": f"{kind}_url", f"{kind}_url": {"url": path.as_uri()}}
            body = {
                "messages": [
                    {"role": "user", "content": [item, {"type": "text", "text": question}]}
                ],
                "max_tokens": 64,
            }
            row = {"custom_id": path.name, "method": "POST", "url": "/v1/chat/completions"}
            print(json.dumps({**row, "body": body}))


if __name__ == "__main__":
    main()
