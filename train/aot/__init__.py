"""Sizing a program on a TPU slice that you do not have: `python -m train.aot`."""
