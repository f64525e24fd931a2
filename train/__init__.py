"""Sharded training programs, run from a checkout: `python -m train.dmd --config=configs/dmd.py`.

The modules at the top, and the packages with a `__main__`, are commands; train/README.md lists them. The other packages
hold their parts: `runtime` is the common base of all programs.
"""
