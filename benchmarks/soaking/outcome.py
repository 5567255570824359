"""What a soak came to: the server afterwards, the requests, the verdicts, and what docs say."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections import Counter
from typing import TYPE_CHECKING, Any

from benchmarks import metrics_page

if TYPE_CHECKING:
    from pathlib import Path

IDLE_TIMEOUT_S = 300.0
COUNTERS = (
    "vllm:request_success_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:num_preemptions_total",
    "vllm:budgetkv_refused_requests_total",
)
# what the log of an engine that failed has
SIGNS = ("EngineDeadError", "EngineCore encountered", "ledger", "RuntimeError", "AssertionError")


def settled(url: str, model: str) -> dict[str, Any]:
    """What the server is like when all clients have gone."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    names = (metrics_page.RUNNING, metrics_page.WAITING, metrics_page.USAGE)
    while True:
        page = metrics_page.read_page(url)
        left = {name: metrics_page.total(page, name) for name in names}
        if not any(left.values()) or time.monotonic() > deadline:
            break
        time.sleep(1.0)
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    return {
        "left": left,
        "health": status_of(f"{url}/health"),
        "last_answer": status_of(f"{url}/v1/chat/completions", json.dumps(body).encode()),
        "counted": {name: metrics_page.total(page, name) for name in COUNTERS},
    }


def status_of(url: str, body: bytes | None = None) -> int:
    """Status code of an answer."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60.0) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def counted(folder: Path) -> dict[str, Any]:
    """Requests of all clients by kind and status, and those that went wrong."""
    kinds: dict[str, Counter[str]] = {}
    wrong = []
    for file in sorted(folder.glob("client-*.jsonl")):
        # a client that was killed may leave half a line
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        for outcome in map(json.loads, lines):
            kinds.setdefault(outcome["kind"], Counter())[str(outcome["status"])] += 1
            if not outcome["right"]:
                wrong.append(outcome)
    return {
        "by_kind": {kind: dict(sorted(found.items())) for kind, found in sorted(kinds.items())},
        "total": sum(found.total() for found in kinds.values()),
        "wrong": len(wrong),
        "examples": wrong[:10],
    }


def errors_of(log: Path) -> list[str]:
    """Lines of the server's log that tell of a failure of the engine, the last of them."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line[:300] for line in lines if any(sign in line for sign in SIGNS)][-10:]


def verdicts(result: dict[str, Any]) -> dict[str, bool]:
    """What has to hold, and whether it does; a process that lived too briefly is not judged.

    Args:
        result: all but the verdicts.
    """
    judged = [found["verdict"] for found in result["processes"]]
    server = result["server"]
    return {
        "memory of every process is flat": "flat" in judged and {*judged} <= {"flat", "too short"},
        "every answer has the status it should": result["requests"]["wrong"] == 0,
        "nothing is held when all have gone": not any(server["left"].values()),
        "the server is well and answers": server["health"] == server["last_answer"] == 200,
        "no failure in the log": not result["log_errors"],
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: a row per process, a list of what held, and where it comes from."""
    lines = [
        "| process | private memory, start / middle / end | slope, 95 % interval | limit | files "
        "| verdict |",
        "|---|---|---|---|---|---|",
    ]
    for found in result["processes"]:
        held = " / ".join(f"{found[f'uss_{when}_mib']:.0f}" for when in ("first", "middle", "last"))
        slope, limit = "-", "-"
        if "slope_mib_per_hour" in found:
            low, high = found["interval_mib_per_hour"]
            slope = f"{found['slope_mib_per_hour']:.1f} ({low:.1f} to {high:.1f}) MiB/h"
            limit = f"{found['limit_mib_per_hour']:.1f} MiB/h"
        files = f"{found['files'][0]} / {found['files'][1]}"
        lines.append(
            f"| {found['name']} | {held} MiB | {slope} | {limit} | {files} | {found['verdict']} |"
        )
    about, requests = result["about"], result["requests"]
    left = sum(sum(n.values()) for kind, n in requests["by_kind"].items() if kind.endswith("left"))
    wrong = sum(requests["by_kind"].get("wrong", {}).values())
    preemptions = result["server"]["counted"]["vllm:num_preemptions_total"]
    said = "; ".join(f"{name}: {'yes' if v else 'no'}" for name, v in result["verdicts"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"{result['seconds'] / 60:.0f} minutes, {about['clients']} requests at once, "
            f"{requests['total']:,} in all: {left:,} whose client left, {wrong:,} wrong bodies, "
            f"{result['client_restarts']} client processes killed; "
            f"{preemptions:,.0f} preemptions. {said}.",
            "",
            f"`{about['command']}` at {about['commit']}, {about['machine']}.",
        ]
    )
