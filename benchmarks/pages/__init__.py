"""Writes docs/performance.md and its plots from the results of `benchmarks.cpu.targets` and
`benchmarks.gpu.targets`.
"""
