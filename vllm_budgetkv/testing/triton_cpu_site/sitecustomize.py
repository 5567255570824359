"""Run by Python at start when this folder is on PYTHONPATH; see ../triton_cpu.py."""

from vllm_budgetkv.testing import triton_cpu

triton_cpu.install()
