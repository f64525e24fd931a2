"""Measure how many full-size samples one process reads per second, and whether a training step waits for them.

    python -m train.measure.loader --needs 36 --hosts 4

`--needs` is the required samples per second of the whole job: global batch size / step time. Samples are read
from a temporary set of full-size latents and text states, or from a given one (--data). Cold means that none of the set
is in the page cache, warm that all of it is. Finally, steps run at exactly the required rate and their waiting time is
measured.

Legend: L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.paths import input_path
from neodragon_jax.base.progress import ProgressBar
from train.data import ArraySpec, RecordSpec, SampleSource, SampleWriter, Source
from train.data.record_spec import ARRAY_DTYPES
from train.runtime.loader import Loader
from train.runtime.sharding import MeshConfig, batch_sharding, make_mesh

# 49 frames of 320x512, and prompts as the denoiser reads them.
LATENTS, TEXT, POOLED = (7, 40, 64, 16), (128, 1536), 2048

EXAMPLES = """
examples:
  the rate that training needs is batch size / step time (train.aot estimates it); 128 samples in 3.6 s on 4 hosts:
    python -m train.measure.loader --needs 35.6 --hosts 4 --batch 32

  your own data, from the disk that training will read:
    python -m train.measure.loader --data LATENTS/320x512 --needs 35.6 --hosts 4 --batch 32
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(
        'python -m train.measure.loader',
        'Measure the data loader, and compare it with the rate that a training job needs.',
        EXAMPLES,
        status='1    the loader is slower than --needs',
    )
    add = parser.add_argument
    add('--needs', type=float, metavar='N', help='samples per second of the whole job (default: only measure)')
    add('--hosts', type=int, default=1, metavar='N', help='processes that share the reading (default: 1)')
    add('--batch', type=int, default=32, metavar='N', help='samples in a batch of one process (default: 32)')
    add('--steps', type=int, default=4, metavar='N', help='steps whose waiting time is measured (default: 4)')
    add('--data', metavar='DIR', help='dataset to read (default: a temporary one)')
    add('--samples', type=int, default=512, metavar='N',
        help='samples of the temporary dataset, 1 MB each (default: 512)')  # fmt: skip
    add('--folder', action=PathOption, metavar='DIR',
        help="parent folder of the temporary dataset (default: the system's folder for temporary files)")  # fmt: skip
    return parser.parse_args(argv)


def full_size_spec() -> RecordSpec:
    """Return the spec of full-size latents with their text states."""
    return RecordSpec(
        {
            'latents': ArraySpec(LATENTS, 'bfloat16'),
            'units': ArraySpec((), 'int32'),
            'text': ArraySpec(TEXT, 'bfloat16'),
            'text_mask': ArraySpec(TEXT[:1], 'int32'),
            'pooled': ArraySpec((POOLED,), 'bfloat16'),
        }
    )


def write_samples(folder: pathlib.Path, count: int) -> None:
    """Write a dataset of full-size samples with different random numbers in each."""
    spec, rng = full_size_spec(), np.random.default_rng(0)
    noise = {
        name: rng.normal(size=array.shape).astype(ARRAY_DTYPES[array.dtype])
        for name, array in spec.arrays.items()
        if array.dtype == 'bfloat16'
    }
    fixed = {'units': LATENTS[0], 'text_mask': np.ones(TEXT[0], np.int32), 'prompt': 'a dragon'}
    with SampleWriter(folder, spec, count, protocol={}, name='benchmark') as writer:
        for index in ProgressBar(writer.missing(), unit='sample', desc='writing'):
            moved = {name: np.roll(array, index, axis=0) for name, array in noise.items()}
            writer.append(fixed | moved | {'index': index})


def evict(folder: pathlib.Path) -> None:
    """Flush a dataset to disk and evict it from the page cache."""
    for path in folder.glob('*array_record*'):
        with path.open('rb') as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def opened(source: Source, batch: int, seed: int) -> Iterator[Loader]:
    """Yield a loader onto the devices of this process, as a training loop opens it."""
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    loader = Loader(source, batch_sharding(mesh), batch_size=batch, seed=seed)
    try:
        yield loader
    finally:
        loader.close()


def loader_rate(source: Source, batch: int, seed: int) -> float:
    """Return the samples per second that reach the devices in one round over the source; opening is not timed."""
    with opened(source, batch, seed) as loader:
        batches = max(len(source) // batch, 1)
        start = time.perf_counter()
        for loaded in itertools.islice(loader, batches):
            jax.block_until_ready(loaded)
        return batches * batch / (time.perf_counter() - start)


def waits(source: Source, batch: int, step_s: float, steps: int) -> list[float]:
    """Return the seconds for which steps of a given length wait for their batches; the first step is not counted."""
    waited = []
    with opened(source, batch, seed=2) as loader:
        for _ in range(steps + 1):
            start = time.perf_counter()
            jax.block_until_ready(next(loader))
            waited.append(time.perf_counter() - start)
            time.sleep(step_s)  # the host is idle while its devices compute
    return waited[1:]


def measure(given: str | pathlib.Path, args: argparse.Namespace) -> bool:
    """Print the rates and waiting times of a dataset; return whether its rate is sufficient."""
    folder = input_path(given, 'sample set')
    source = SampleSource(folder)
    size_mb = sum(
        int(np.prod(array.shape)) * ARRAY_DTYPES[array.dtype].itemsize for array in source.spec.arrays.values()
    )
    size_mb /= 1e6
    print(f'{len(source)} samples of {size_mb:.3f} MB, batches of {args.batch}, {os.cpu_count()} cores')
    loader_rate(source, args.batch, seed=0)  # the first transfer initializes the devices
    evict(folder)
    rates = {'cold': loader_rate(source, args.batch, seed=1), 'warm': loader_rate(source, args.batch, seed=1)}
    for name, rate in rates.items():
        print(f'{name}: {rate:.1f} samples per second, {rate * size_mb:.0f} MB/s')
    if args.needs is None:
        return True
    needs, enough = args.needs / args.hosts, True
    for name, rate in rates.items():
        enough &= rate >= needs
        print(f'{name}: {rate / needs:.1f} times the {needs:.2f} samples per second that each of {args.hosts} needs')
    evict(folder)
    step_s = args.batch / needs
    waited = waits(source, args.batch, step_s, args.steps)
    print(f'{args.steps} steps of {step_s:.2f} s waited {1e3 * np.mean(waited):.1f} ms each for their batch, at most '
          f'{1e3 * max(waited):.1f} ms: {100 * np.mean(waited) / step_s:.2f} % of the step')  # fmt: skip
    return enough


def run(args: argparse.Namespace) -> bool:
    """Measure the dataset of a command line; return whether its rate is sufficient.

    Raises:
      InputError: an argument is wrong, or the dataset cannot be read.
    """
    for name in ('hosts', 'batch', 'steps', 'samples'):
        if getattr(args, name) < 1:
            raise InputError(f'--{name} is {getattr(args, name)}; give at least 1.')
    if args.needs is not None and args.needs <= 0:
        raise InputError(f'--needs is {args.needs}; give samples per second, such as 36.')
    if args.data is not None:
        return measure(args.data, args)
    if args.folder is not None and not args.folder.is_dir():
        raise InputError(f'--folder {args.folder}: no such folder. Make it, or leave --folder out.')
    with tempfile.TemporaryDirectory(prefix='loader_benchmark-', dir=args.folder) as folder:
        write_samples(pathlib.Path(folder), args.samples)
        return measure(pathlib.Path(folder), args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: int(not run(parse_args(argv))))


if __name__ == '__main__':
    sys.exit(main())
