"""Sizing of a training program for a TPU slice, without the slice: `python -m train.aot`."""
