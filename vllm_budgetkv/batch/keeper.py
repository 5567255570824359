"""Runs a command that must not outlive who asked for it.

    python -m vllm_budgetkv.batch.keeper COMMAND [ARGUMENT ...]

A server whose parent is killed stays, with its engine and its GPU. So the parent holds the other
end of our standard input, and its end, of whatever kind, ends the command and all that it started.
Ray kills the children of a worker that ends, before they could end theirs: so we are no child of
it, and it sees that we are gone by the end of our standard output. The command writes to standard
error.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LOOK_SECONDS = 0.2
STOP_SECONDS = 20.0


def keep(command: Sequence[str], parent: int) -> None:
    """Run `command` until it ends or `parent` does.

    Args:
        command: program and arguments.
        parent: file descriptor that is at its end when the parent is gone.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True
    )
    try:
        while process.poll() is None:
            if select.select([parent], [], [], LOOK_SECONDS)[0] and not os.read(parent, 1024):
                process.send_signal(signal.SIGINT)
                process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    finally:
        # what the command started and left behind is in its group
        _end_group(process.pid)
        process.wait()


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    os.setsid()
    keep(sys.argv[1:], sys.stdin.fileno())
