"""A real headless Chromium behind a pipe: Debian's package, unpacked into `build/` once."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
UNPACKED = ROOT / "build" / "chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_S = 60.0
# the program's and ours: what a pipe to Chromium must be called
ITS_INPUT, ITS_OUTPUT = 3, 4


def program() -> tuple[str, dict[str, str]]:
    """Path of the browser, and variables for its libraries; skips where there is none."""
    for name in NAMES:
        found = shutil.which(name)
        if found is not None:
            return found, {}
    path = UNPACKED / "usr" / "lib" / "chromium" / "chromium"
    if not path.exists():
        _unpack()
    libraries = UNPACKED / "usr" / "lib" / "x86_64-linux-gnu"
    return str(path), {"LD_LIBRARY_PATH": f"{libraries}:{libraries / 'pulseaudio'}"}


def _unpack() -> None:
    """Download the package and what it needs and this machine lacks; nothing is installed."""
    UNPACKED.mkdir(parents=True, exist_ok=True)
    plan = "apt-get install --simulate --no-install-recommends chromium"
    names = f"$({plan} | sed -n 's/^Inst \\([^ ]*\\).*/\\1/p')"
    unpack = "for file in *.deb; do dpkg -x $file . && rm $file; done"
    try:
        for command in (f"apt-get download {names}", unpack):
            shell = ["sh", "-ec", command]
            subprocess.run(shell, cwd=UNPACKED, check=True, capture_output=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no Chromium: it is not installed, and Debian's package neither ({error})")


class Browser:
    """A Chromium with one page; see `running`.

    Args:
        process: the browser.
        to_browser, from_browser: ends of the pipes.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], to_browser: int, from_browser: int
    ) -> None:
        self.process, self.to_browser, self.from_browser = process, to_browser, from_browser
        self.numbers = itertools.count(1)
        self.buffer = b""
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None

    def attach(self) -> None:
        """Open the page that all calls are about."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Result of a method of the DevTools protocol."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.from_browser], [], [], deadline - time.monotonic())
            part = os.read(self.from_browser, 1 << 20) if ready else b""
            assert part, "the browser does not answer"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, width: int, *, is_dark: bool = False) -> None:
        """Show a file on a screen so wide, as a phone where it is narrow."""
        self.events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"]["value"]

    def requested(self) -> list[str]:
        """Addresses that the page asked for, but for what it holds itself."""
        urls = [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]

    def screenshot(self, path: Path) -> None:
        """Write all of the page as a PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def running(folder: Path) -> Iterator[Browser]:
    """A browser inside, ended behind it, whatever happens.

    Args:
        folder: for its profile and log.
    """
    path, variables = program()
    (read_end, to_browser), (from_browser, write_end) = os.pipe(), os.pipe()
    # out of the way of the numbers that they shall have there
    its_input, its_output = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read_end, write_end))
    command = [path, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    command += [f"--user-data-dir={folder / 'profile'}", "--hide-scrollbars", "about:blank"]
    # a shell puts the pipes where the browser looks for them
    places = f"exec {ITS_INPUT}<&{its_input} {ITS_OUTPUT}>&{its_output}"
    with (folder / "chromium.log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-c", f'{places}; exec "$@"', "chromium", *command],
            pass_fds=(its_input, its_output),
            env=os.environ | variables,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    for end in (read_end, write_end, its_input, its_output):
        os.close(end)
    try:
        browser = Browser(process, to_browser, from_browser)
        browser.attach()
        yield browser
    finally:
        process.terminate()
        process.wait(30)
        os.close(to_browser)
        os.close(from_browser)
