"""Triton kernels of the ops, for GPUs; a launcher per op with the signature of its reference.

Nothing waits for the device: every grid follows from shapes, and a kernel trusts its tables where
the C++ kernels check them. Addresses are 64-bit. `TRITON_INTERPRET=1` runs them on a CPU.
"""
