"""A client process of `benchmarks.soak`: some requests at once, again and again, until it is ended.

    python -m benchmarks.soaking.client --url URL --model NAME --seed N --threads N --out FILE

One JSON line for each request that ended: its kind, status, whether that was expected, seconds.
Some clients leave before the answer came, or in the middle of it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import urlsplit

from benchmarks.soaking.bodies import Bodies

if TYPE_CHECKING:
    from benchmarks.soaking.bodies import Sent

TIMEOUT_S = 600.0
LEAVE_SHARE = 0.2
LEAVE_AFTER_S = (0.0, 3.0)
READ_BYTES = 512


def main() -> None:
    parser = argparse.ArgumentParser(description="Sends requests until it is ended.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lock = threading.Lock()
    threading.excepthook = end_process
    with options.out.open("w", encoding="utf-8") as out:
        threads = [
            threading.Thread(target=send_on, args=(options, number, lock, out))
            for number in range(options.threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def end_process(problem: threading.ExceptHookArgs) -> None:
    """A thread that fails takes the process along: fewer clients would go unnoticed."""
    traceback.print_exception(problem.exc_value)
    os._exit(1)


def send_on(options: argparse.Namespace, number: int, lock: threading.Lock, out: TextIO) -> None:
    """One request after another, without an end."""
    chance = random.Random(f"{options.seed}-{number}")
    bodies = Bodies(options.model, chance)
    while True:
        sent = bodies.any()
        leaves = sent.expected == (200,) and chance.random() < LEAVE_SHARE
        wait_s = chance.uniform(*LEAVE_AFTER_S) if leaves else None
        outcome = send(options.url, sent, wait_s)
        with lock:
            out.write(json.dumps(outcome) + "\n")
            out.flush()


def send(url: str, sent: Sent, leave_after_s: float | None) -> dict[str, Any]:
    """Posts one request, and reads the answer or leaves.

    Args:
        url: of the server.
        sent: the request.
        leave_after_s: seconds until the client closes the connection; None to read to the end.

    Returns:
        Status 0 where the client left before one came, -1 where the connection failed.
    """
    started = time.monotonic()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
    status, error, wanted = 0, "", sent.expected
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", sent.path, sent.body, headers)
        if leave_after_s is None:
            answer = connection.getresponse()
            status = answer.status
            text = answer.read()
            # an engine that fails in the middle of a stream says so in an event, under status 200
            is_stream = status == 200 and sent.streams
            is_whole = not is_stream or (b"[DONE]" in text[-64:] and b'data: {"error"' not in text)
            error = "" if status in wanted and is_whole else text[-300:].decode(errors="replace")
            status = status if is_whole else -1
        elif sent.streams:
            status, wanted = _read_some(connection, leave_after_s), (0, 200)
        else:
            time.sleep(leave_after_s)
            wanted = (0,)
    except (OSError, http.client.HTTPException) as problem:
        status, error = -1, repr(problem)
    finally:
        connection.close()
    return {
        "kind": sent.kind if leave_after_s is None else f"{sent.kind}, left",
        "status": status,
        "right": status in wanted,
        "seconds": round(time.monotonic() - started, 3),
        "error": error,
    }


def _read_some(connection: http.client.HTTPConnection, leave_after_s: float) -> int:
    """Reads a stream until the client has had enough."""
    deadline = time.monotonic() + leave_after_s
    assert connection.sock is not None
    connection.sock.settimeout(max(leave_after_s, 0.05))
    try:
        answer = connection.getresponse()
        while time.monotonic() < deadline and answer.read1(READ_BYTES):
            continue
    except TimeoutError:
        return 0
    return answer.status


if __name__ == "__main__":
    main()
