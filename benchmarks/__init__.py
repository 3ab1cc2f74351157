"""Measurements behind every figure that this project states: `python -m benchmarks CASE`.

A case checks its results first and refuses to report wrong ones. What is compared runs in
alternation on the same machine. Results are JSON files, and `report` makes docs/benchmarks.md of
them.
"""
