"""Benchmarks. Run from the repository: `python -m tools.bench.main`, `.invariant`, `.engine`."""
