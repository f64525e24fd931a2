"""Compute and store the states of T5-XXL, so that the text distillation trains without the teacher in memory.

    python -m train.text_states --data PROMPTS --teacher T5XXL --out STATES

Reads a folder of train.prompts and writes one with the same ids and masks, and with the teacher's states: t5 [L, E],
zero at padded tokens. At full size that is 1 MiB per prompt in bfloat16. Run the same command again to resume. With
--distributed, each process writes separate shards.

Legend: B prompts at a time, L text tokens, E width of the states.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from neodragon_jax.base.command_line import PathOption, add_distributed, command_parser, exit_status
from neodragon_jax.base.compile_cache import use_compile_cache
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.output import output_folder
from neodragon_jax.base.processes import separate_shares
from neodragon_jax.base.progress import ProgressBar
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.checkpoint.params import read_params
from neodragon_jax.generation.devices import Spread
from neodragon_jax.models.t5 import T5Encoder
from train.data import DTYPES, ArraySpec, RecordSpec, SampleSource, SampleWriter
from train.text.program import IDS, MASK, T5_STATES


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(
        'python -m train.text_states',
        'Compute and store the states of T5-XXL for prompts, so that train.text runs without T5-XXL.',
        'example:\n  python -m train.text_states --data PROMPTS --teacher T5XXL --out STATES',
    )
    add = parser.add_argument
    add('--data', required=True, metavar='DIR', help='folder of train.prompts')
    add('--teacher', action=PathOption, bucket=True, required=True, metavar='DIR',
        help='component folder of a T5 encoder')  # fmt: skip
    add('--out', action=PathOption, bucket=True, required=True, metavar='DIR', help='folder of the states')
    add('--batch', type=int, default=16, metavar='N', help='prompts at a time on each device (default: %(default)s)')
    add('--dtype', choices=tuple(DTYPES), default='bfloat16', help='compute type (default: %(default)s)')
    add('--store-dtype', choices=tuple(DTYPES), default='bfloat16', help='type on disk (default: %(default)s)')
    add('--samples-per-shard', type=int, default=1024, metavar='N', help='samples per file (default: %(default)s)')
    add_distributed(add)
    return parser.parse_args(argv)


def records(
    source: SampleSource, module: T5Encoder, params: Any, indices: Sequence[int], spread: Spread, batch: int
) -> Iterator[dict[str, Any]]:
    """Yield the samples of some indices, in order; each batch fills all devices."""
    run = jax.jit(lambda params, ids, mask: module.apply({'params': params}, ids, mask) * (mask != 0)[..., None])
    size = batch * len(spread.devices)
    for start in range(0, len(indices), size):
        rows = [source[index] for index in indices[start : start + size]]
        padded = rows + [rows[-1]] * (size - len(rows))
        states = jax.device_get(
            run(params, *(spread.shard(np.stack([r[name] for r in padded])) for name in (IDS, MASK)))
        )
        for index, row, state in zip(indices[start : start + size], rows, states, strict=False):
            yield {'index': index, 'prompt': row['prompt'], IDS: row[IDS], MASK: row[MASK], T5_STATES: state}


def run(args: argparse.Namespace) -> None:
    """Write the states that are missing.

    Raises:
      InputError: an argument or a folder is not usable.
    """
    if args.batch < 1:
        raise InputError(f'--batch is {args.batch}; give at least 1.')
    with separate_shares(args.distributed, args.start_timeout_s, args.out) as (index, count):
        use_compile_cache(tell=index == 0)
        with output_folder(args.out, index, count):
            write_states(args)


def write_states(args: argparse.Namespace) -> None:
    """Load the encoder and write the states that are missing."""
    source = SampleSource(args.data)
    if not {IDS, MASK} <= set(source.spec.arrays):
        raise InputError(f'{args.data}: its samples have no {IDS}; pass a folder of train.prompts.')
    module = checkpoint.load_module(args.teacher, T5Encoder)
    spread = Spread(jax.local_devices())
    params = spread.replicate(read_params(args.teacher, DTYPES[args.dtype]))
    ids = source.spec.arrays[IDS]
    states = ArraySpec((*ids.shape, module.config.d_model), args.store_dtype)
    spec = RecordSpec({IDS: ids, MASK: source.spec.arrays[MASK], T5_STATES: states})
    protocol = source.protocol | {'teacher': fingerprint(args.teacher), 'dtype': args.dtype}
    options = {'part': jax.process_index(), 'parts': jax.process_count(), 'name': 'text_states'}
    options['samples_per_shard'] = args.samples_per_shard
    full = 0
    with SampleWriter(args.out, spec, len(source), protocol=protocol, **options) as writer:
        missing = writer.missing()
        made = records(source, module.clone(dtype=DTYPES[args.dtype]), params, missing, spread, args.batch)
        for record in ProgressBar(made, total=len(missing), unit='prompt'):
            full += bool(np.all(record[MASK]))
            writer.append(record)
    if full:
        print(f'{args.out}: {full} prompts fill all {ids.shape[0]} tokens; train.prompts has cut the longer ones')
    print(f'{args.out}: {len(missing)} prompts written by process {jax.process_index()}; {writer.state}')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_args(argv)))


if __name__ == '__main__':
    sys.exit(main())
