"""Small models, rendered frames and a Triton stand-in for tests, the demo and the benchmarks.

Nothing in the serving path imports this package. Its modules import torch, transformers and Pillow
when they are used.
"""
