"""A worker of a batch: a server of its own, and the rows that it is given."""

from __future__ import annotations

import json
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.batch.rows import Row, answer_of
from vllm_budgetkv.batch.server import Server, ServerGone

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Answerer:
    """Answers batches of rows; Ray makes one for each worker and calls it from several threads.

    Args:
        input_file: path of the rows, which every worker must see.
        arguments: of `vllm serve`.
    """

    def __init__(self, input_file: str, arguments: Sequence[str]) -> None:
        self.input_file = Path(input_file)
        self.worker = f"{socket.gethostname()}:{os.getpid()}"
        self.server = Server(arguments)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Answer rows at once.

        Args:
            batch: the fields of `Row` by name, each an array over the rows.

        Returns:
            `answer`: for each row the JSON object that is written for it.
        """
        names = list(batch)
        values = zip(*(batch[name].tolist() for name in names), strict=True)
        rows = [Row(**dict(zip(names, row, strict=True))) for row in values]
        try:
            with ThreadPoolExecutor(len(rows)) as pool:
                answers = list(pool.map(self._answer, rows))
        except ServerGone as error:
            sys.stderr.write(f"{error}\n")
            sys.stderr.flush()
            # an exception would be retried here, without a server; Ray replaces a worker that ends
            os._exit(1)
        return {"answer": [json.dumps(answer) for answer in answers]}

    def _answer(self, row: Row) -> dict[str, Any]:
        url, body = row.read(self.input_file)
        status_code, answer = self.server.ask(url, body)
        return answer_of(row, status_code, answer, self.worker)
