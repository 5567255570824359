"""Parts of `benchmarks.bench_kernels`: counted work, caches, checks, peers, cases, report."""
