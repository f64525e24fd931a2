"""Measure the denoiser and a distillation step beside a straightforward PyTorch version. See `--help`."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from neodragon_jax.base.atomic import atomic_file, check_writable
from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import read_json
from neodragon_jax.base.lists import known_entries
from train.measure.against_torch.case import STAGES, TINY, Case, Measured
from train.measure.against_torch.report import JAX, TORCH, equal_sizes, table

_FOLDER = pathlib.Path(__file__).parent
_ROOT = _FOLDER.parents[2]
_OUT_OF_MEMORY = ('out of memory', 'RESOURCE_EXHAUSTED')
EXAMPLES = """
examples:
  on one GPU with 80 GB or more, in less than ten minutes; PyTorch is in an environment of its own:
    python3.11 -m venv TORCH && TORCH/bin/pip install -r train/measure/against_torch/requirements.txt
    python -m train.measure.against_torch --torch-python TORCH/bin/python --out out/against_torch

  the rehearsal on a CPU, without PyTorch:
    JAX_PLATFORMS=cpu python -m train.measure.against_torch --tiny --sides jax --out out/against_torch

The sides take turns in processes of their own, so that each has the whole memory of the GPU.
"""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Options of this command.

    Attributes:
      sides: 'jax', 'torch' or both.
      rounds: turns of each side.
      torch_python: interpreter of the environment with PyTorch and diffusers.
      out: folder of against_torch.md and against_torch.json.
    """

    case: Case
    sides: tuple[str, ...]
    rounds: int
    torch_python: str
    out: pathlib.Path


def parse_options(argv: Sequence[str] | None = None) -> Comparison:
    """Return the options of a command line.

    Raises:
      InputError: an option is wrong.
    """
    description = 'Measure the denoiser and a distillation step beside a straightforward PyTorch version of both.'
    parser = command_parser('python -m train.measure.against_torch', description, EXAMPLES)
    add = parser.add_argument
    add('--out', action=PathOption, required=True, metavar='DIR', help='folder of the table and of all times')
    add('--tiny', action='store_true', help='measure a miniature, to rehearse on a CPU')
    add('--sides', default=f'{JAX},{TORCH}', metavar='LIST', help='sides to measure (default: %(default)s)')
    add('--stages', default='0,1,2', metavar='LIST', help='pyramid stages to measure (default: %(default)s)')
    add('--batch', type=int, metavar='N',
        help=f'samples in a batch (default: {Case.batch}, or {TINY.batch} with --tiny)')  # fmt: skip
    add('--rounds', type=int, default=2, metavar='N', help='turns of each side (default: %(default)s)')
    add('--torch-python', default=sys.executable, metavar='PYTHON',
        help='interpreter of an environment with PyTorch and diffusers (default: that of this command)')  # fmt: skip
    args = parser.parse_args(argv)
    for name in ('batch', 'rounds'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f'--{name} is {getattr(args, name)}; give at least 1.')
    stages = tuple(map(int, known_entries('--stages', args.stages, map(str, range(STAGES)))))
    case = dataclasses.replace(TINY if args.tiny else Case(), stages=stages)
    case = case if args.batch is None else dataclasses.replace(case, batch=args.batch)
    sides = tuple(known_entries('--sides', args.sides.lower(), (JAX, TORCH)))
    return Comparison(case, sides, args.rounds, args.torch_python, args.out)


def run(options: Comparison) -> None:
    """Let the sides take turns; write the table and all times.

    Raises:
      InputError: PyTorch is not installed, the folder cannot be written, or the memory does not suffice.
      RuntimeError: a worker failed, or the sides have models of different sizes.
    """
    check_writable(options.out)
    commands = {JAX: [sys.executable, '-m', 'train.measure.against_torch.jax_worker']}
    if TORCH in options.sides:
        _check_torch(options.torch_python)
        commands[TORCH] = [options.torch_python, str(_FOLDER / 'torch_worker.py')]
    rounds: dict[str, list[Measured]] = {side: [] for side in options.sides}
    for number in range(options.rounds):
        for side in options.sides:
            print(f'round {number + 1} of {options.rounds}: {side}', flush=True)
            rounds[side].append(_turn(side, commands[side], options.case))
    if not equal_sizes(rounds):
        raise RuntimeError(f'the models differ in size: {[results[0].parameters for results in rounds.values()]}')
    report = table(options.case, rounds)
    values = {side: [dataclasses.asdict(result) for result in results] for side, results in rounds.items()}
    with atomic_file(options.out / 'against_torch.json') as path:
        path.write_text(json.dumps({'case': options.case.to_json(), 'rounds': values}, indent=2) + '\n')
    with atomic_file(options.out / 'against_torch.md') as path:
        path.write_text(report)
    print(report)


def _check_torch(python: str) -> None:
    """Raise InputError unless an interpreter has the packages of requirements.txt."""
    needed = 'import torch, diffusers'
    try:
        found = subprocess.run([python, '-c', needed], capture_output=True, text=True)
    except OSError as error:
        raise InputError(f'--torch-python {python}: {error.strerror}. Give the path of an interpreter.') from None
    if found.returncode:
        raise InputError(
            f'--torch-python {python}: no PyTorch or diffusers there. Run: {python} -m pip install -r '
            f'{(_FOLDER / "requirements.txt").relative_to(_ROOT)}; or measure without: --sides {JAX}.'
        )


def _turn(side: str, command: Sequence[str], case: Case) -> Measured:
    """Run a worker and return its results; errors as of `run`."""
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder) / 'measured.json'
        done = subprocess.run(
            [*command, str(result)],
            input=json.dumps(case.to_json() if side == TORCH else dataclasses.asdict(case)),
            capture_output=True,
            text=True,
            cwd=_ROOT,
            # Neither side reserves memory that it does not use, so that the peaks can be compared.
            env=os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', 'JAX_NUM_CPU_DEVICES': '1'},
        )
        if done.returncode:
            if any(words in done.stderr for words in _OUT_OF_MEMORY):
                raise InputError(f'--batch {case.batch}: {side} runs out of memory; give a smaller batch.')
            raise RuntimeError(f'the {side} worker failed with status {done.returncode}:\n{done.stderr[-3000:]}')
        return read_json(result, Measured)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_options(argv)))


if __name__ == '__main__':
    sys.exit(main())
