"""Sizing jobs: every combination of slice, mesh, batch and choices, and the model FLOPs of each step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from neodragon_jax.base.errors import InputError
from train.aot import chips as aot_chips
from train.aot.report import Case
from train.aot.xla_flags import FLAGS
from train.runtime import loop, runner
from train.runtime.model_flops import of_step
from train.runtime.platform import AUTO, ON_TPU
from train.runtime.sharding import AXES, MeshConfig, make_mesh
from train.runtime.step import variants

# A ConfigDict; type checkers do not know its attributes.
Settings = Any

# Settings of a section that do not change the results of a program.
CHOICES = ('remat', 'attention')
LARGEST, ALL = 'largest', 'all'


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the sizing, besides the program's settings.

    Attributes:
      topologies: names of slices.
      slices: number of slices of each.
      variant: variant of the step: one of the program's, LARGEST (by FLOPs) or ALL.
      meshes: [data, fsdp, tensor]; empty for the mesh of the settings.
      batches: batch sizes per device; empty for the batch of the settings.
      choices: values to try for each of CHOICES; empty for the values of the settings.
      flags: compiler flags.
      cache: folder of results.
    """

    topologies: tuple[str, ...]
    variant: str = LARGEST
    meshes: tuple[tuple[int, ...], ...] = ()
    batches: tuple[int, ...] = ()
    choices: tuple[tuple[str, tuple[str, ...]], ...] = ()
    flags: tuple[tuple[str, str], ...] = tuple(FLAGS.items())
    cache: str = 'out/aot'
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class Job:
    """A case and its settings."""

    case: Case
    settings: Settings


def make_jobs(program: str, settings: Settings, options: Options) -> list[Job]:
    """Return all steps to compile.

    Raises:
      InputError: a slice, mesh, variant or setting does not exist or fit.
    """
    slices = [aot_chips.topology(name, options.slices) for name in options.topologies]
    settings = _on_tpu(settings)
    counted = functools.cache(lambda batch_size: model_flops(program, settings, batch_size))
    made = []
    for slice_, changed in itertools.product(slices, _changes(settings, options.choices)):
        for mesh in options.meshes or (dataclasses.astuple(MeshConfig(**settings.loop.mesh.to_dict())),):
            sizes = _mesh_on(slice_, mesh)
            groups = sizes[0] * sizes[1]
            for batch in [groups * batch for batch in options.batches] or [_whole(settings.loop.batch_size, groups)]:
                placed = changed.copy_and_resolve_references()
                placed.loop.batch_size = batch
                placed.loop.mesh.update(dict(zip(AXES, sizes, strict=True)))
                made += _of_variants(program, placed, slice_, options.variant, counted(batch), settings.loop.batch_size)
    return made


def _of_variants(
    program: str,
    settings: Settings,
    slice_: aot_chips.Topology,
    wanted: str,
    counted: dict[Any, float],
    run_batch: int,
) -> Iterator[Job]:
    """Yield a job for each requested variant of the step, whose model FLOPs are `counted`.

    A run of the unplaced settings has batches of `run_batch`.
    """
    abstract = runner.size(program, settings)
    shares, run = variants(abstract.program), abstract.run
    names = {str(variant): variant for variant in shares}
    if wanted == LARGEST:
        chosen = [max(counted, key=counted.__getitem__)]
    elif wanted == ALL:
        chosen = list(shares)
    elif wanted in names:
        chosen = [names[wanted]]
    else:
        raise InputError(f'--variant={wanted}: {program} has no such step; use {", ".join(names)}, {LARGEST} or {ALL}.')
    unused = getattr(abstract.program, 'unused', lambda variant, sample: None)
    for variant in chosen:
        case = Case(
            program=program,
            variant=str(variant),
            share=shares[variant],
            topology=slice_,
            mesh=dataclasses.astuple(run.mesh),
            batch_size=run.batch_size,
            samples=run.batch_size * (run.updates or 1),
            options={name: section[name] for name, section in sections(settings)},
            model_flops=counted[variant],
            run_samples=run.samples // run.batch_size * run_batch,
            unused=unused(variant, abstract.source[0]),
        )
        yield Job(case, settings)


def sections(settings: Settings, names: Iterable[str] = CHOICES) -> Iterator[tuple[str, Settings]]:
    """Yield (name, section) for each of the named settings in each section that has it."""
    for name in names:
        for section in settings.values():
            if isinstance(section, ConfigDict) and name in section:
                yield name, section


def _on_tpu(settings: Settings) -> Settings:
    """Return the settings with each `auto` replaced by its choice on TPUs."""
    settings = settings.copy_and_resolve_references()
    for _, section in sections(settings, ('attention',)):
        if section.attention == AUTO:
            section.attention = ON_TPU
    return settings


def _changes(settings: Settings, choices: Sequence[tuple[str, Sequence[str]]]) -> Iterator[Settings]:
    """Yield copies of the settings with every combination of the choices."""
    for values in itertools.product(*(values for _, values in choices)):
        changed = settings.copy_and_resolve_references()
        for (name, _), value in zip(choices, values, strict=True):
            known = [section for option, section in sections(changed) if option == name]
            if not known:
                raise InputError(f'--{name}s: the program has no setting "{name}"; leave it out.')
            for section in known:
                section[name] = value
        yield changed


def _mesh_on(slice_: aot_chips.Topology, mesh: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of a mesh over all devices of a slice; a size of -1 is inferred."""
    given = math.prod(size for size in mesh if size > 0)
    sizes = tuple(slice_.devices // given if size == -1 else size for size in mesh)
    if len(mesh) != 3 or math.prod(sizes) != slice_.devices:
        raise InputError(
            f'mesh {"x".join(map(str, mesh))} (data x fsdp x tensor) is not one over the {slice_.devices} devices of '
            f'{slice_}; choose three sizes with that product, or -1 for one of them.'
        )
    return sizes


def _whole(batch_size: int, groups: int) -> int:
    """Return the batch size of the settings, rounded up to a multiple of the mesh's groups."""
    whole = math.ceil(batch_size / groups) * groups
    if whole != batch_size:
        print(f'batch_size {batch_size} does not divide over {groups} devices; sizing {whole}.', file=sys.stderr)
    return whole


def model_flops(program: str, settings: Settings, batch_size: int) -> dict[Any, float]:
    """Return the model FLOPs of each variant of a step on a batch, without recomputation and padding.

    Roll-outs of the student count to their last unit.

    Raises:
      InputError: a setting is wrong.
    """
    settings = settings.copy_and_resolve_references()
    settings.loop.batch_size = batch_size
    abstract = runner.size(program, settings)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices('cpu')[:1])
    arguments = loop.abstract_arguments(
        abstract.program, abstract.program.frozen(), abstract.source, abstract.run, mesh
    )
    return {variant: of_step(abstract.program, variant, arguments) for variant in variants(abstract.program)}
