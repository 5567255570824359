"""Device code on head-pages: one function per op, which knows pages and no policy.

They take their tables as views (`views.py`). Each has a plain torch reference (`reference/`, the
spec), a C++ kernel for the CPU (`csrc/`) and a Triton kernel for GPUs (`triton/`); `backend.py`
chooses. `docs/kv_layout.md` is the map and the legend of shapes.
"""

from __future__ import annotations

from vllm_budgetkv.ops.append import append
from vllm_budgetkv.ops.attend import attend
from vllm_budgetkv.ops.attend_part import attend_part
from vllm_budgetkv.ops.compact import compact
from vllm_budgetkv.ops.contrast import contrast
from vllm_budgetkv.ops.digest import digest
from vllm_budgetkv.ops.encode import encode
from vllm_budgetkv.ops.load import load
from vllm_budgetkv.ops.mark import mark
from vllm_budgetkv.ops.merge import merge
from vllm_budgetkv.ops.quantise import quantise
from vllm_budgetkv.ops.recall import recall
from vllm_budgetkv.ops.reserve import reserve
from vllm_budgetkv.ops.retrieve import retrieve
from vllm_budgetkv.ops.score import Scores, score
from vllm_budgetkv.ops.select import select
from vllm_budgetkv.ops.stage import stage
from vllm_budgetkv.ops.store import store
from vllm_budgetkv.ops.views import (
    BatchRows,
    FreeStack,
    PageChoice,
    PagedHeads,
    RecallHeads,
    Softmax,
    TierLayer,
)

__all__ = [
    "BatchRows",
    "FreeStack",
    "PageChoice",
    "PagedHeads",
    "RecallHeads",
    "Scores",
    "Softmax",
    "TierLayer",
    "append",
    "attend",
    "attend_part",
    "compact",
    "contrast",
    "digest",
    "encode",
    "load",
    "mark",
    "merge",
    "quantise",
    "recall",
    "reserve",
    "retrieve",
    "score",
    "select",
    "stage",
    "store",
]
