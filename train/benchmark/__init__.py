"""The whole system learned from nothing on moving shapes: `python -m train.benchmark`."""
