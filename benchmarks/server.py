"""A `vllm serve` process on loopback that always ends with its `with` block."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from openai import OpenAI

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
LOG_LINES = 25


class Server:
    """Starts `vllm serve` on entry, returns once it answers, and stops it on any way out.

    Args:
        model: folder or name of the model.
        arguments: of `vllm serve`, besides model, host and port.
        log: file for the output of the server; overwritten.
        environment: of the server.
        start_timeout_s: how long it may take until it answers.

    Raises:
        RuntimeError: the server died or did not answer in time; with the end of its log.
    """

    def __init__(
        self,
        model: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.environment = environment
        self.start_timeout_s = start_timeout_s
        # the console script of this environment, whatever PATH says
        vllm = str(Path(sys.executable).parent / "vllm")
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        self.command = [vllm, "serve", model, *address, *arguments]

    def __enter__(self) -> Server:
        with self.log.open("w") as log:
            # a session of its own: Ctrl-C reaches us alone, and the whole group can be ended
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def client(self) -> OpenAI:
        """An OpenAI client of this server."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=1800.0)

    def stop(self) -> None:
        """Ends the server and the engine processes it started; does nothing when they are gone."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        try:
            # engine processes that outlived the server are in its group
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"vllm serve ended at start:\n{self._log_tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise RuntimeError(f"no answer after {self.start_timeout_s:.0f} s:\n{self._log_tail()}")

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def free_port() -> int:
    """A TCP port that nothing on loopback listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
