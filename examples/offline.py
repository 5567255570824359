"""Pictures and questions without a server, each request with its report.

python examples/offline.py MODEL IMAGE [IMAGE ...]
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

from vllm_budgetkv import budget_args


def picture(path: str) -> dict[str, object]:
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def main() -> None:
    model, *paths = sys.argv[1:]
    llm = LLM(
        model,
        max_model_len=8192,
        limit_mm_per_prompt={"image": len(paths)},
        skip_mm_profiling=True,
        **budget_args(policy="hybrid", page_quota=64, chunk_tokens=256),
    )
    images = [picture(path) for path in paths]
    questions = ["What do the pictures have in common?", "Which text do they show?"]
    conversations = [
        [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]
        for question in questions
    ]
    # the second asks for a smaller quota
    params = [
        SamplingParams(max_tokens=64, extra_args=extra) for extra in (None, {"kv_page_quota": 48})
    ]
    for output in llm.chat(conversations, params, use_tqdm=False):
        report = output.kv_transfer_params["budgetkv"]
        print(output.outputs[0].text.strip())
        print(f"  held {report['peak_blocks']} of {report['quota_blocks']} blocks")


if __name__ == "__main__":
    main()
