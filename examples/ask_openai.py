"""A video and a question, and what the request held of the KV cache.

python examples/ask_openai.py VIDEO QUESTION [--url http://localhost:8000/v1] [--page-quota 48]
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video", type=Path)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--page-quota", type=int, help="blocks of this request alone")
    options = parser.parse_args()

    client = OpenAI(base_url=options.url, api_key="none")
    data = base64.b64encode(options.video.read_bytes()).decode()
    video = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
    # without max_tokens a request asks for all of --max-model-len
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": [video, {"type": "text", "text": options.question}]}],
        max_tokens=64,
        extra_body={"vllm_xargs": {"kv_page_quota": options.page_quota}}
        if options.page_quota
        else None,
    )
    report = answer.kv_transfer_params["budgetkv"]
    print(answer.choices[0].message.content)
    print(
        f"{answer.usage.prompt_tokens} prompt tokens; held {report['peak_blocks']} blocks of "
        f"{report['block_tokens']} tokens, a full cache holds {report['full_cache_blocks']}"
    )


if __name__ == "__main__":
    main()
