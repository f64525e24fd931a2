"""Benchmark of the whole system, trained from scratch on moving shapes: `python -m train.benchmark`."""
