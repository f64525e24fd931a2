"""Sharded training programs, run from a checkout: `python -m train.dmd --config=configs/dmd.py`."""
