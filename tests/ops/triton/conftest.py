"""These tests run in a process of their own, which `tests/ops/test_triton.py` starts.

Triton decides when it is imported whether its kernels are interpreted, so other processes ignore
this folder.
"""

from __future__ import annotations

import os

from vllm_budgetkv.ops import backend

collect_ignore_glob = [] if os.environ.get(backend.INTERPRETER_VARIABLE) == "1" else ["test_*.py"]
