"""Models, matrices and a baseline that tests and benchmarks share; not installed."""
