"""Sizes a program on a TPU slice that you do not have: compiles its very step for it, on this machine's CPU.

    python -m train.aot --config=configs/dmd.py --topology=v5e:4x4
    python -m train.aot --config=configs/dmd.py --topology=v5e:4x4,v5p:2x2x4 --sweep --batches=1,8 --remats=full,dots

The step is the one that the training loop runs, with its settings, mesh and shardings; --config.KEY=VALUE changes them.
Prints memory per device against capacity, arithmetic, communication, step time, utilization and samples per second;
train/aot/report.py tells how they are estimated. A program that does not fit is a result, not an error. Neither a
checkpoint nor data are needed, and nothing is allocated. The compiler comes with `pip install -e '.[tpu]'` (libtpu);
a full-size step takes two to five minutes on one core and up to 7 GB. Results are kept in --cache: the same command
goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import tqdm
from absl import flags as command_flags
from jax.interpreters import partial_eval
from ml_collections import ConfigDict, config_flags

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from train.aot import chips as aot_chips
from train.aot import report as aot_report
from train.aot.report import Case, Facts
from train.aot.request import INPUT_ERROR, QUIET, Request
from train.aot.xla_flags import FLAGS
from train.runtime import flops, loop, runner
from train.runtime.platform import AUTO, ON_TPU
from train.runtime.sharding import AXES, MeshConfig, make_mesh
from train.runtime.step import variants

# A ConfigDict; type checkers do not know its attributes.
Settings = Any

# Settings of a program's own section that only change how it is computed.
CHOICES = ('remat', 'attention')
# Values of such settings, and of others that save memory, with which nothing is computed twice or padded.
PLAIN = {'remat': 'none', 'attention': 'masked', 'memory': {'blocks': False, 'window': 0}, 'accumulate': 1}
LARGEST, ALL = 'largest', 'all'
SWEPT_BATCHES, SWEPT_REMATS = (1, 4, 8), ('full', 'dots')


@dataclasses.dataclass(frozen=True)
class Options:
    """What to size, besides the program's settings.

    Attributes:
      topologies: names of slices.
      variant: of the step: one of the program's, LARGEST (by arithmetic) or ALL.
      meshes: [data, fsdp, tensor]; none for that of the settings.
      batches: per device; none for that of the settings.
      choices: values to try for each of CHOICES; none for those of the settings.
      flags: of the compiler.
      cache: folder of results.
    """

    topologies: tuple[str, ...]
    variant: str = LARGEST
    meshes: tuple[tuple[int, ...], ...] = ()
    batches: tuple[int, ...] = ()
    choices: tuple[tuple[str, tuple[str, ...]], ...] = ()
    flags: tuple[tuple[str, str], ...] = tuple(FLAGS.items())
    cache: str = 'out/aot'


@dataclasses.dataclass(frozen=True)
class Job:
    """A case and the settings that make it."""

    case: Case
    settings: Settings


def jobs(program: str, settings: Settings, options: Options) -> list[Job]:
    """Return all that is to be compiled.

    Raises:
      InputError: a slice, mesh, variant or setting does not exist or fit.
    """
    slices = [aot_chips.topology(name) for name in options.topologies]
    settings = _on_tpu(settings)
    per_sample = model_flops(program, settings)
    made = []
    for slice_, changed in itertools.product(slices, _changes(settings, options.choices)):
        for mesh in options.meshes or (dataclasses.astuple(MeshConfig(**settings.loop.mesh.to_dict())),):
            sizes = _mesh_on(slice_, mesh)
            groups = sizes[0] * sizes[1]
            for batch in [groups * batch for batch in options.batches] or [_whole(settings.loop.batch_size, groups)]:
                placed = changed.copy_and_resolve_references()
                placed.loop.batch_size = batch
                placed.loop.mesh.update(dict(zip(AXES, sizes, strict=True)))
                made += _of_variants(program, placed, slice_, options.variant, per_sample)
    return made


def _of_variants(
    program: str, settings: Settings, slice_: aot_chips.Topology, wanted: str, per_sample: dict[Any, float]
) -> Iterator[Job]:
    """Yield a job for each wanted variant of the step."""
    abstract = runner.size(program, settings)
    shares, run = variants(abstract.program), abstract.run
    names = {str(variant): variant for variant in shares}
    if wanted == LARGEST:
        chosen = [max(per_sample, key=per_sample.__getitem__)]
    elif wanted == ALL:
        chosen = list(shares)
    elif wanted in names:
        chosen = [names[wanted]]
    else:
        raise InputError(f'--variant={wanted}: {program} has no such step; use {", ".join(names)}, {LARGEST} or {ALL}.')
    for variant in chosen:
        case = Case(
            program=program,
            variant=str(variant),
            share=shares[variant],
            topology=slice_,
            mesh=dataclasses.astuple(run.mesh),
            batch_size=run.batch_size,
            samples=run.batch_size * (run.updates or 1),
            options={name: section[name] for name, section in _sections(settings)},
            model_flops=per_sample[variant] * run.batch_size,
        )
        yield Job(case, settings)


def _sections(settings: Settings, names: Iterable[str] = CHOICES) -> Iterator[tuple[str, Settings]]:
    """Yield each of some settings that a section has, with the section."""
    for name in names:
        for section in settings.values():
            if isinstance(section, ConfigDict) and name in section:
                yield name, section


def _on_tpu(settings: Settings) -> Settings:
    """Return the settings with the choices that `auto` makes on TPUs."""
    settings = settings.copy_and_resolve_references()
    for _, section in _sections(settings, ('attention',)):
        if section.attention == AUTO:
            section.attention = ON_TPU
    return settings


def _changes(settings: Settings, choices: Sequence[tuple[str, Sequence[str]]]) -> Iterator[Settings]:
    """Yield copies of the settings with every combination of the choices."""
    for values in itertools.product(*(values for _, values in choices)):
        changed = settings.copy_and_resolve_references()
        for (name, _), value in zip(choices, values, strict=True):
            sections = [section for known, section in _sections(changed) if known == name]
            if not sections:
                raise InputError(f'--{name}s: the program has no setting "{name}"; leave it out.')
            for section in sections:
                section[name] = value
        yield changed


def _mesh_on(slice_: aot_chips.Topology, mesh: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of a mesh over all devices of a slice; one may be -1, the rest."""
    given = math.prod(size for size in mesh if size > 0)
    sizes = tuple(slice_.devices // given if size == -1 else size for size in mesh)
    if len(mesh) != 3 or math.prod(sizes) != slice_.devices:
        raise InputError(
            f'mesh {"x".join(map(str, mesh))} (data x fsdp x tensor) is not one over the {slice_.devices} devices of '
            f'{slice_.name}; choose three sizes with that product, or -1 for one of them.'
        )
    return sizes


def _whole(batch_size: int, groups: int) -> int:
    """Return the batch size of the settings, or the next that the mesh divides."""
    whole = math.ceil(batch_size / groups) * groups
    if whole != batch_size:
        print(f'batch_size {batch_size} does not divide over {groups} devices; sizing {whole}.', file=sys.stderr)
    return whole


def model_flops(program: str, settings: Settings) -> dict[Any, float]:
    """Return the FLOPs that each variant of a step asks for per sample of a batch: nothing recomputed, nothing padded.

    Raises:
      InputError: a setting is wrong.
    """
    settings = settings.copy_and_resolve_references()
    settings.loop.batch_size = 1
    for name, section in _sections(settings, PLAIN):
        section[name] = PLAIN[name]
    abstract = runner.size(program, settings)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices('cpu')[:1])
    arguments = loop.abstract_arguments(
        abstract.program, abstract.program.frozen(), abstract.source, abstract.run, mesh
    )
    return {
        variant: traced_flops(functools.partial(loop.guarded_step, abstract.program, variant), *arguments)
        for variant in variants(abstract.program)
    }


def traced_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the FLOPs of matrix products and convolutions that the results of a function need; nothing is compiled."""
    closed = jax.make_jaxpr(function)(*arguments)
    # What no output needs, such as gradients of constants, would be counted else.
    needed, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    counted = flops.count(needed)
    if counted.open_loops:
        raise NotImplementedError('products in a loop of unknown length; use lax.scan.')
    return counted.total


def compile_job(job: Job, options: Options) -> Facts:
    """Compile a job in a process of its own, or find its result.

    Raises:
      InputError: libtpu is absent, or a setting is wrong.
      RuntimeError: the compiler failed for another reason than memory.
    """
    if importlib.util.find_spec('libtpu') is None:
        raise InputError("libtpu, the TPU compiler, is not installed; run: pip install -e '.[tpu]'")
    request = Request(
        program=job.case.program,
        settings=job.settings.to_json(),
        topology=job.case.topology.name,
        variant=job.case.variant,
        flags=dict(options.flags),
        cache=os.path.abspath(options.cache),
    )
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
        with open(result) as file:
            return Facts(**json.load(file))


def _environment(log_folder: str) -> dict[str, str]:
    """Return the worker's environment: without flags that would change its results behind the cache's back."""
    kept = {name: value for name, value in os.environ.items() if name not in ('LIBTPU_INIT_ARGS', 'XLA_FLAGS')}
    return kept | QUIET | {'TPU_LOG_DIR': log_folder}


def mean_of_variants(sized: Sequence[tuple[Case, Facts]]) -> str:
    """Return the line on a run in which all variants of a step take their turns."""
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
    """Size a program as the command line says.

    Raises:
      InputError: something in the command line is wrong.
    """
    # Tracing needs no accelerator and must not take one.
    jax.config.update('jax_platforms', 'cpu')
    given: Any = command_flags.FLAGS
    program = runner.program_name(config_flags.get_config_filename(given['config']))
    options = _options(given, settings)
    todo = jobs(program, settings, options)
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
    if given.json:
        with atomic_file(given.json) as path:
            path.write_text(json.dumps([aot_report.to_json(*pair) for pair in sized], indent=1) + '\n')


def define_flags() -> None:
    """Add the flags of this command to the program's own."""
    command_flags.DEFINE_list('topology', [], 'slices, such as v5e:4x4; a wrong name lists all')
    command_flags.DEFINE_string('variant', LARGEST, f'of the step: a variant of the program, {LARGEST} or {ALL}')
    command_flags.DEFINE_bool('sweep', False, 'try meshes, batches and choices; print a table with the best in bold')
    command_flags.DEFINE_list('meshes', [], 'data x fsdp x tensor, such as 1x16x1,4x4x1; a sweep tries two by default')
    command_flags.DEFINE_list('batches', [], 'samples per device; a sweep tries 1,4,8 by default')
    command_flags.DEFINE_list('remats', [], 'remat settings; a sweep tries full,dots by default')
    command_flags.DEFINE_list('attentions', [], 'attention settings')
    command_flags.DEFINE_list('flags', [], 'NAME=VALUE of the compiler, besides those of train/aot/xla_flags.py')
    command_flags.DEFINE_string('cache', 'out/aot', 'folder of results')
    command_flags.DEFINE_string('json', '', 'file to write all numbers to')


def _options(given: Any, settings: Settings) -> Options:
    """Return the options on the command line, with the defaults of a sweep."""
    if not given.topology:
        raise InputError('--topology is empty; name a slice, such as --topology=v5e:4x4.')
    choices = {'remat': tuple(given.remats), 'attention': tuple(given.attentions)}
    meshes, batches = [_integers(text, '--meshes') for text in given.meshes], given.batches
    if given.sweep:
        has_remat = any(name == 'remat' for name, _ in _sections(settings))
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
        cache=given.cache,
    )


def _integers(text: str, flag: str) -> tuple[int, ...]:
    """Return the numbers of a text such as 4x4x1."""
    try:
        return tuple(int(part) for part in text.split('x'))
    except ValueError:
        raise InputError(f'{flag}: {text!r} holds something else than numbers; write them like 4x4x1.') from None


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition('=')
    if not value:
        raise InputError(f'--flags: {text!r} has no value; write NAME=VALUE.')
    return name.removeprefix('--'), value
