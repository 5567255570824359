"""What stands in for `vllm serve` where a test is about its ends: a folder to put before vLLM's.

It answers with the text that it was asked, refuses `--model refused`, and dies of the text "die".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MAIN = """
import json, os, socketserver, sys
from http.server import BaseHTTPRequestHandler


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.tell({})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        if text == "die":
            os._exit(1)
        self.tell({"choices": [{"message": {"content": text}}]})

    def tell(self, answer):
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def address_string(self):
        return "client"


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


def main():
    if "refused" in sys.argv:
        raise ValueError("a quota of 2 blocks is too small")
    Server(sys.argv[sys.argv.index("--uds") + 1], Handler).serve_forever()
"""


def write_server(folder: Path) -> Path:
    """Write the package; returns `folder`, for PYTHONPATH."""
    package = folder / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for part in (package, package.parent, package.parent.parent):
        (part / "__init__.py").touch()
    (package / "main.py").write_text(MAIN, encoding="utf-8")
    return folder
