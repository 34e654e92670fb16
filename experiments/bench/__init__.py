"""Benchmarks: ratios against peers in one process, medians of interleaved runs.

`python -m experiments.bench engine` and so on print one table each and write them
as JSON; `all` runs every one. No test asserts a time.
"""
