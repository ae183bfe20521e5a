"""Benchmarks on a CPU: the targets, and groups of operators and networks for pytest-benchmark."""
