"""A real Prometheus that scrapes a server: Debian's package, unpacked into `build/` once."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.server import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "monitoring"
UNPACKED = ROOT / "build" / "prometheus"
START_TIMEOUT_S = 30.0


def program(name: str) -> str:
    """Path of `prometheus` or `promtool`; skips the test where neither is to be had."""
    found = shutil.which(name)
    if found is not None:
        return found
    path = UNPACKED / "usr" / "bin" / name
    if not path.exists():
        _unpack()
    return str(path)


def _unpack() -> None:
    UNPACKED.mkdir(parents=True, exist_ok=True)
    try:
        for command in (["apt-get", "download", "prometheus"], ["sh", "-c", "dpkg -x *.deb ."]):
            subprocess.run(command, cwd=UNPACKED, check=True, capture_output=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no Prometheus: it is not installed, and Debian's package neither ({error})")


class Prometheus:
    """One that scrapes a server; see `running`.

    Args:
        target: host and port that it scrapes every second.
        folder: for its data and log.
    """

    def __init__(self, target: str, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.url = f"http://127.0.0.1:{self.port}"
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(MONITORING / "alerts.yml")],
            "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": [target]}]}],
        }
        # JSON is YAML
        (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")

    @contextmanager
    def running(self) -> Iterator[Prometheus]:
        """Ready inside, ended behind it, whatever happens."""
        command = [
            program("prometheus"),
            f"--config.file={self.folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        log = self.folder / "prometheus.log"
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not self._is_ready():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, "Prometheus did not become ready"
                time.sleep(0.2)
            yield self
        finally:
            process.terminate()
            process.wait(30)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=1):
                return True
        except OSError:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of an answer of its API."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as page:
            answer = json.load(page)
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series that an expression has now."""
        return self.get("query", query=expression)["result"]
