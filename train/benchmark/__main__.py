"""`python -m train.benchmark`: see train/benchmark/run.py."""

import sys

from train.benchmark.run import main

if __name__ == '__main__':
    sys.exit(main())
