"""What `benchmarks.bench_load` is made of: its cases, equal pools, a driven server, the report."""
