"""Benchmarks of this package; run from the root of the repository: `python -m benchmarks.decoding --help`."""
