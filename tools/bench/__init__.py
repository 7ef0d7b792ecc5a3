"""Benchmarks beside ``tools.bench_step``, and what is timed in all of them."""
