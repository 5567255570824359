"""A `vllm serve` of one worker, reached by a socket in its own folder."""

from __future__ import annotations

import http.client
import json
import select
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

LOOK_SECONDS = 0.5
LOG_LINES = 20
# as the command of the same name, whatever PATH says
VLLM = "import sys; from vllm.entrypoints.cli.main import main; sys.argv[0] = 'vllm'; main()"


class ServerGone(RuntimeError):
    """The server ended; the end of its log is the message."""


class Server:
    """Starts a server, returns once it answers, and ends it with this process.

    Args:
        arguments: of `vllm serve`, the model first or behind `--model`.

    Raises:
        ServerGone: it refused its arguments, or failed.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="budgetkv-")
        self.socket = str(Path(self.folder.name) / "http")
        self.log = Path(self.folder.name) / "log"
        keeper = [sys.executable, "-m", "vllm_budgetkv.batch.keeper"]
        command = [*keeper, sys.executable, "-c", VLLM, "serve", *arguments, "--uds", self.socket]
        with self.log.open("w") as log:
            self.keeper = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        while not self._is_ready():
            if self._is_gone(LOOK_SECONDS):
                raise ServerGone(self._log_tail())

    def ask(self, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """POST `body`; safe to call from several threads.

        Args:
            url: path on the server.
            body: the JSON object to send.

        Returns:
            The status code and the JSON object of the answer.

        Raises:
            ServerGone: the server ended before it answered.
        """
        connection = _Connection(self.socket)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", url, json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerGone(f"{error!r}; {self._log_tail()}") from error
        finally:
            connection.close()
        # a server whose engine died says so, request by request, and ends a little later
        if answer.status >= 500 and not self._is_ready():
            raise ServerGone(self._log_tail())
        return answer.status, _object_of(text)

    def stop(self) -> None:
        """End the server and all that it started."""
        assert self.keeper.stdin is not None and self.keeper.stdout is not None
        self.keeper.stdin.close()
        self.keeper.stdout.read()
        self.keeper.stdout.close()
        self.keeper.wait()
        self.folder.cleanup()

    def _is_gone(self, timeout_seconds: float) -> bool:
        """Whether the keeper ends, which ends last, within this time."""
        assert self.keeper.stdout is not None
        return bool(select.select([self.keeper.stdout], [], [], timeout_seconds)[0])

    def _is_ready(self) -> bool:
        connection = _Connection(self.socket)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _log_tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(["vllm serve ended; its log:", *lines[-LOG_LINES:]])


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self.path)


def _object_of(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    return {"error": {"message": text.decode(errors="replace"), "type": "BadAnswerError"}}
