"""Parts of `benchmarks.bench_kernels`: shapes, counted work, caches, checks, peers, cases, report."""
