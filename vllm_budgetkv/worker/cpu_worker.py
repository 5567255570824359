"""The worker on a CPU. Apart from `worker.py`, because vLLM's sets up the process when imported."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_budgetkv.worker.worker import BudgetWorker


class BudgetCPUWorker(BudgetWorker, CPUWorker):
    """`BudgetWorker` over vLLM's `CPUWorker`, itself a `Worker`: our steps come before both."""
