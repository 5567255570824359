#!/usr/bin/env bash
# A video and a question with curl, and the report of the request.
#
#   examples/ask_curl.sh VIDEO QUESTION [URL]
set -euo pipefail
url=${3:-http://localhost:8000/v1}
model=$(curl -sSf "$url/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
# a video is too long for a command line, so the request comes from a pipe
python3 - "$1" "$2" "$model" <<'END' | curl -sSf "$url/chat/completions" -H 'Content-Type: application/json' -d @-
import base64, json, sys

path, question, model = sys.argv[1:]
data = base64.b64encode(open(path, "rb").read()).decode()
video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + data}}
content = [video, {"type": "text", "text": question}]
request = {
    "model": model,
    "messages": [{"role": "user", "content": content}],
    "max_tokens": 64,
    "vllm_xargs": {"kv_lookahead": 1},
}
print(json.dumps(request))
END
