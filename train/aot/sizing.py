"""Sizing of a training program for a TPU slice: compiles its training step for the slice on this machine's CPU.

    python -m train.aot --config=configs/dmd.py --topology=v5e:4x4
    python -m train.aot --config=configs/dmd.py --topology=v5e:4x4,v5p:2x2x4 --sweep --batches=1,8 --remats=kernel,dots

The step is the one that the training loop runs, with its settings, mesh and shardings; --config.KEY=VALUE changes them.
Prints memory per device against capacity, arithmetic, communication, step time, utilization and samples per second;
train/aot/report.py documents the estimates. A program that does not fit is a result, not an error. Neither a checkpoint
nor data is needed, and no parameters are allocated. The compiler comes with `pip install -e '.[tpu]'` (libtpu); a
full-size step takes minutes on one core and up to 10 GB (docs/tpu_sizing.md). Results are cached in --cache: run the
same command again to resume.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import tqdm
from absl import flags as command_flags
from ml_collections import config_flags

from neodragon_jax.base.atomic import atomic_file, check_file_writable
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import read_json
from neodragon_jax.base.paths import user_path
from train.aot import report as aot_report
from train.aot.chips import require_compiler
from train.aot.jobs import ALL, LARGEST, Job, Options, Settings, make_jobs, sections
from train.aot.report import Case, Facts
from train.aot.request import INPUT_ERROR, QUIET, Request
from train.aot.xla_flags import FLAGS
from train.runtime import runner

SWEPT_BATCHES, SWEPT_REMATS = (1, 4, 8), ('kernel', 'dots')


def compile_job(job: Job, options: Options) -> Facts:
    """Compile a job in a separate process, or return its cached result.

    Raises:
      InputError: libtpu is absent, or a setting is wrong.
      RuntimeError: the compiler failed for a reason other than memory.
    """
    require_compiler()
    request = Request(
        program=job.case.program,
        settings=job.settings.to_json(),
        topology=job.case.topology.name,
        slices=job.case.topology.slices,
        variant=job.case.variant,
        flags=dict(options.flags),
        cache=os.path.abspath(options.cache),
    )
    return _in_worker(request)


def _in_worker(request: Request) -> Facts:
    """Compile in a separate process; errors as of `compile_job`."""
    with tempfile.TemporaryDirectory() as folder:
        result = os.path.join(folder, 'facts.json')
        command = [sys.executable, '-m', 'train.aot.worker', result]
        done = subprocess.run(
            command,
            input=json.dumps(dataclasses.asdict(request)),
            env=_environment(folder),
            capture_output=True,
            text=True,
        )
        if done.returncode == INPUT_ERROR:
            with open(result) as file:
                raise InputError(file.read())
        if done.returncode:
            raise RuntimeError(f'the compiler failed with status {done.returncode}:\n{done.stderr[-3000:]}')
        return read_json(result, Facts)


def _environment(log_folder: str) -> dict[str, str]:
    """Return the worker's environment, without flags that would change its results but not the cache key."""
    kept = {name: value for name, value in os.environ.items() if name not in ('LIBTPU_INIT_ARGS', 'XLA_FLAGS')}
    return kept | QUIET | {'TPU_LOG_DIR': log_folder}


def mean_of_variants(sized: Sequence[tuple[Case, Facts]]) -> str:
    """Return the report line of the mean over all variants of a step, weighted by their shares."""
    if not all(facts.fits for _, facts in sized):
        return 'all steps  some do not fit'
    rows = [(case.share, aot_report.estimate(case, facts).step_s) for case, facts in sized]
    step = [sum(share * times[place] for share, times in rows) for place in range(2)]
    rate = [sized[0][0].samples / seconds for seconds in step]
    return (
        f'all steps  {step[0]:.3f} to {step[1]:.3f} s on average, {rate[1]:.2f} to {rate[0]:.2f} samples/s, '
        f'{rate[1] * aot_report.DAY:,.0f} to {rate[0] * aot_report.DAY:,.0f} samples/day'
    )


def main(settings: Settings, dry_run: bool = False) -> None:
    """Size a program with the options of the command line.

    Raises:
      InputError: an option is wrong.
    """
    # Tracing needs no accelerator and must not occupy one.
    jax.config.update('jax_platforms', 'cpu')
    given: Any = command_flags.FLAGS
    program = runner.program_name(config_flags.get_config_filename(given['config']))
    options = _options(given, settings)
    record = user_path(given.json, '--json') if given.json else None
    if record is not None:
        check_file_writable(record, '.json')
    todo = make_jobs(program, settings, options)
    if dry_run:
        for job in todo:
            print(*aot_report.row(job.case, Facts(fits=False, needed_bytes=0, lower_s=0, compile_s=0))[:5], sep='  ')
        return
    sized = []
    for job in tqdm.tqdm(todo, desc='compiling', unit='step', disable=None if len(todo) > 1 else True):
        sized.append((job.case, compile_job(job, options)))
    if given.sweep:
        print(aot_report.table(sized))
    else:
        print('\n\n'.join(aot_report.text(*pair) for pair in sized))
        if options.variant == ALL:
            for name in options.topologies:
                print(mean_of_variants([pair for pair in sized if pair[0].topology.name == name]))
    if record is not None:
        with atomic_file(record) as path:
            path.write_text(json.dumps([aot_report.to_json(*pair) for pair in sized], indent=1) + '\n')


def define_flags() -> None:
    """Add the flags of this command to those of the program."""
    command_flags.DEFINE_list('topology', [], 'slices, such as v5e:4x4; an unknown name prints all known ones')
    command_flags.DEFINE_integer('num-slices', 1, 'slices joined by the network of the data center; `data` crosses it')
    command_flags.DEFINE_string('variant', LARGEST, f'variant of the step: one of the program, {LARGEST} or {ALL}')
    command_flags.DEFINE_bool('sweep', False, 'try meshes, batches and choices; print a table with the best in bold')
    command_flags.DEFINE_list('meshes', [], 'data x fsdp x tensor, such as 1x16x1,4x4x1; a sweep tries two by default')
    command_flags.DEFINE_list('batches', [], 'samples per device; a sweep tries 1,4,8 by default')
    tried = ','.join(SWEPT_REMATS)
    command_flags.DEFINE_list('remats', [], f'values of the setting remat; a sweep tries {tried} by default')
    command_flags.DEFINE_list('attentions', [], 'values of the setting attention')
    command_flags.DEFINE_list('flags', [], 'compiler flags, NAME=VALUE, in addition to those of train/aot/xla_flags.py')
    command_flags.DEFINE_string('cache', 'out/aot', 'folder in which results are cached')
    command_flags.DEFINE_string('json', '', 'also write all numbers to this file')


def _options(given: Any, settings: Settings) -> Options:
    """Return the options on the command line, with the defaults of a sweep."""
    if not given.topology:
        raise InputError('--topology is empty; name a slice, such as --topology=v5e:4x4.')
    choices = {'remat': tuple(given.remats), 'attention': tuple(given.attentions)}
    meshes, batches = [_integers(text, '--meshes') for text in given.meshes], given.batches
    if given.sweep:
        has_remat = any(name == 'remat' for name, _ in sections(settings))
        choices['remat'] = choices['remat'] or (SWEPT_REMATS if has_remat else ())
        meshes = meshes or [(1, -1, 1), (-1, 4, 1)]
        batches = batches or SWEPT_BATCHES
    return Options(
        topologies=tuple(given.topology),
        variant=given.variant,
        meshes=tuple(meshes),
        batches=tuple(_integers(str(text), '--batches')[0] for text in batches),
        choices=tuple((name, values) for name, values in choices.items() if values),
        flags=tuple((FLAGS | dict(_pair(text) for text in given.flags)).items()),
        cache=str(user_path(given.cache, '--cache')),
        slices=given['num-slices'].value,
    )


def _integers(text: str, flag: str) -> tuple[int, ...]:
    """Return the integers of a text such as 4x4x1."""
    try:
        return tuple(int(part) for part in text.split('x'))
    except ValueError:
        raise InputError(f'{flag}: {text!r} is not a list of numbers; write them like 4x4x1.') from None


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition('=')
    if not value:
        raise InputError(f'--flags: {text!r} has no value; write NAME=VALUE.')
    return name.removeprefix('--'), value
