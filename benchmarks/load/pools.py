"""Pools of equal bytes: blocks of stock vLLM, and of ours beside page tables and probe banks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.load.cases import Pool

REPOSITORY = Path(__file__).parents[2]
# vLLM's block pool keeps one block that stands for none
RESERVED_BLOCKS = 1


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What both sides start with.

    Args:
        stock: blocks of stock vLLM, the reserved one included.
        ours: blocks of ours, likewise.
        stock_block_bytes: keys and values of all layers and heads.
        our_block_bytes: with digests and positions.
        table_bytes: of ours outside of blocks: tables and probe banks of all requests at once.
    """

    stock: int
    ours: int
    stock_block_bytes: int
    our_block_bytes: int
    table_bytes: int

    @property
    def pool_bytes(self) -> int:
        """What stock vLLM takes; ours takes no more."""
        return self.stock * self.stock_block_bytes

    def as_json(self) -> dict[str, Any]:
        ours_bytes = self.ours * self.our_block_bytes + self.table_bytes
        return asdict(self) | {"stock_bytes": self.pool_bytes, "our_bytes": ours_bytes}


def equal_blocks(pool: Pool, plan: dict[str, Any], *, page_tokens: int, requests: int) -> Blocks:
    """As many blocks as the bytes of the other side pay for.

    Args:
        pool: says how much stock vLLM holds.
        plan: of `vllm-budgetkv plan --json` for a request under the quota of the pool.
        page_tokens: of a block.
        requests: that run at once at most; ours has tables for each from the start.

    Raises:
        ValueError: the tables alone take all.
    """
    each_blocks = -(-pool.longest_tokens // page_tokens)
    stock = pool.requests * each_blocks + RESERVED_BLOCKS
    stock_block_bytes = plan["full_cache"]["block_bytes"]
    our_block_bytes = plan["under_quota"]["block_bytes"]
    table_bytes = requests * plan["slot_bytes"]
    ours = (stock * stock_block_bytes - table_bytes) // our_block_bytes
    if ours <= plan["quota"]["blocks"]:
        raise ValueError(
            f"a pool of {stock * stock_block_bytes} bytes has {max(0, ours)} blocks beside "
            f"{table_bytes} bytes of tables, a request holds {plan['quota']['blocks']}"
        )
    return Blocks(
        stock=stock,
        ours=ours,
        stock_block_bytes=stock_block_bytes,
        our_block_bytes=our_block_bytes,
        table_bytes=table_bytes,
    )


def read_plan(model: str, pool: Pool, server: list[str]) -> dict[str, Any]:
    """What the plugin itself counts for a request of the longest kind.

    Args:
        model: folder.
        pool: for its quota and its longest request.
        server: arguments that the server of ours will get.

    Raises:
        RuntimeError: the plan was refused; with its words.
    """
    command = [str(Path(sys.executable).parent / "vllm-budgetkv"), "plan", "--json"]
    command += ["--model", model, "--tokens", str(pool.longest_tokens), *server]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)
