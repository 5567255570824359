"""The demo and the benchmarks; run them as modules from the root of the repository."""
