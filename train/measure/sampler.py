"""Size the sampling of teacher videos on a TPU by compiling: seconds of a video, and videos per chip-hour.

    python -m train.measure.sampler --topology v5e:1x1,v6e:1x1

The programs are those that `train.teacher_samples` runs for every call of the denoiser: guidance in a doubled batch,
each stage with and without a history, and the modulation. They are compiled at the released sizes for one chip. A slice
samples as many batches at a time as it has chips, without communication. Times are the calibrated estimate of
`train.aot`; text encoders, noise and writing are left out. The extra `tpu` is needed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint.abstract import abstract_params
from neodragon_jax.config.neodragon import FULL
from neodragon_jax.generation import defaults as generation
from neodragon_jax.generation.options import VideoOptions
from neodragon_jax.generation.plan import video_settings
from neodragon_jax.models.attention import strategy
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.pyramid.history import history_stage
from neodragon_jax.pyramid.sampler import Plan, Prompt
from train.aot.chips import Topology, topology
from train.aot.compilation import facts_of
from train.aot.report import Case, Facts, estimate, needs
from train.aot.request import QUIET
from train.aot.xla_flags import FLAGS
from train.flow.guidance import scale_by_unit
from train.flow.guided_teacher import GuidedTeacher, calls_of
from train.flow.teacher_sampler import MODE
from train.runtime.model_flops import traced_flops
from train.runtime.platform import ON_TPU
from train.runtime.sharding import MeshConfig, make_mesh

EXAMPLES = """examples:
  videos that the teacher samples whole, on two chips:
    python -m train.measure.sampler --topology v5e:1x1,v6e:1x1
  videos whose first frame is a picture, as `train.teacher_samples --first-frame PICTURES` writes them:
    python -m train.measure.sampler --first-frame picture
"""
GENERATED, PICTURE = 'generated', 'picture'
TEXT_TOKENS = 128
# Samples of the paper's distillation (arXiv 2511.06055, section on step distillation).
PAPER_SAMPLES = 350_000
COLUMNS = (
    *('topology', 'attention', 'videos at a time', 'GiB', 'ms of a call', 's a video', 'of it modulation', 'MFU %'),
    *('videos per chip-hour', 'chip-hours of 350,000'),
)
# A compiled program: the stage, or None for the modulation, and whether it is of unit 0.
Part = tuple[int | None, bool]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command line; see its help."""

    batch: int
    attention: str
    first_unit: int
    cache: str


def released_plan() -> Plan:
    """Return the plan of the released teacher, without guidance, which is a part of its programs."""
    settings = video_settings(VideoOptions(), MODE, generation.RELEASED)
    return dataclasses.replace(settings.plan, guidance=None, first_guidance=None)


def runs(plan: Plan, first_unit: int) -> dict[Part, int]:
    """Return how often each program runs for one batch of videos; a modulation serves all calls of its timestep."""
    count, modulated = collections.Counter[Part](), set[tuple[bool, float]]()
    for call in calls_of(plan, first_unit):
        count[call.stage, call.unit == 0] += 1
        modulated.add((call.unit == 0, call.timestep))
    count[None, False] = len(modulated)
    return dict(count)


def make_teacher(attention: str, plan: Plan, mesh: Mesh) -> GuidedTeacher:
    """Return the full-size teacher with its released guidance, without parameters."""
    many = generation.RELEASED.of(MODE)
    guidance, first_guidance = many.guidance, many.first_guidance
    assert guidance is not None and first_guidance is not None
    module = PyramidMMDiT(FULL.denoiser, jnp.bfloat16, scan=True, attention=attention)
    negative = jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), prompts(1))
    return GuidedTeacher(module, lambda: None, negative, scale_by_unit(guidance, first_guidance), plan, mesh)


def prompts(batch: int, at: Any = jax.ShapeDtypeStruct) -> Prompt:
    """Return the conditioning of a batch as abstract arrays."""
    config = FULL.denoiser
    return Prompt(
        at((batch, TEXT_TOKENS, config.caption_projection_dim), jnp.bfloat16),
        at((batch, TEXT_TOKENS), jnp.int32),
        at((batch, config.pooled_projection_dim), jnp.float32),
    )


def arguments(
    teacher: GuidedTeacher, plan: Plan, part: Part, batch: int, sharding: Any = None
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a compiled function of the teacher and its arguments as abstract arrays."""
    at: Any = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    placed = functools.partial(jax.tree.map, lambda leaf: at(leaf.shape, leaf.dtype))
    params = jax.tree.map(lambda leaf: at(leaf.shape, jnp.bfloat16), abstract_params(teacher.module))
    timestep, given = at((), jnp.float32), prompts(batch, at)
    stage, first = part
    if stage is None:
        return teacher.modulate, (params, given.pooled, timestep)
    modulation = tuple(
        placed(jax.eval_shape(teacher.modulate, params, prompts(count).pooled, timestep)) for count in (1, batch)
    )

    def frame(level: int) -> Any:
        coarser = plan.schedule.stages - 1 - level
        return at((batch, 1, plan.height >> coarser, plan.width >> coarser, plan.channels), jnp.float32)

    past = [] if first else [frame(history_stage(stage, distance)) for distance in range(plan.frames - 1, 0, -1)]
    return teacher.flow, (params, modulation, past, frame(stage), at((batch,), jnp.int32), given)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program and how often a batch of videos runs it."""

    case: Case
    facts: Facts
    runs: int

    @property
    def seconds(self) -> float:
        """Seconds of one run; nothing is communicated on one chip."""
        times = estimate(self.case, self.facts)
        return times.compute_s + times.kernels_s


def compile_parts(slice_: Topology, plan: Plan, options: Options) -> Iterator[tuple[Part, Compiled]]:
    """Compile every program for one chip."""
    mesh = make_mesh(MeshConfig(1, 1, 1), slice_.compile_devices()[:1])
    teacher, plain = (make_teacher(attention, plan, mesh) for attention in (options.attention, 'masked'))
    for part, count in runs(plan, options.first_unit).items():
        function, given = arguments(teacher, plan, part, options.batch, NamedSharding(mesh, PartitionSpec()))
        start = time.perf_counter()
        lowered = function.lower(*given)  # pyright: ignore[reportFunctionMemberAccess]
        facts = facts_of(lowered, mesh, slice_, FLAGS, options.cache, time.perf_counter() - start)
        reference, abstract = arguments(plain, plan, part, options.batch)
        work, samples, chosen = traced_flops(reference, *abstract), options.batch, {'attention': options.attention}
        case = Case('sampler', str(part), 1.0, slice_, (1, 1, 1), samples, samples, chosen, work)
        yield part, Compiled(case, facts, count)


def row(slice_: Topology, parts: dict[Part, Compiled], options: Options) -> list[str]:
    """Return the cells of a row, see COLUMNS."""
    cells = [slice_.name, options.attention, str(options.batch)]
    if too_large := [part.facts for part in parts.values() if not part.facts.fits]:
        memory = f'does not fit: {needs(too_large[0], slice_.chip.hbm_gib)}; try fewer videos at a time'
        return [*cells, memory, *[''] * (len(COLUMNS) - 4)]
    needed = max(part.facts.needed_bytes for part in parts.values()) / 2**30
    seconds = {part: compiled.runs * compiled.seconds for part, compiled in parts.items()}
    video = sum(seconds.values()) / options.batch
    modulation = sum(value for (stage, _), value in seconds.items() if stage is None) / options.batch
    work = sum(compiled.runs * compiled.case.model_flops for compiled in parts.values()) / options.batch
    calls = [parts[stage, False].seconds for stage, first in parts if stage is not None and not first]
    # A chip has one or two devices.
    per_hour = 3600 / video * slice_.chip.devices
    return [
        *cells,
        f'{needed:.1f} of {slice_.chip.hbm_gib:.1f}',
        ' / '.join(f'{1e3 * value:.0f}' for value in calls),
        f'{video:.2f}',
        f'{modulation:.2f}',
        f'{100 * work / (video * slice_.chip.peak_flops):.0f}',
        f'{per_hour:,.0f}',
        f'{PAPER_SAMPLES / per_hour:,.0f}',
    ]


def run(slices: Sequence[str], batches: Sequence[int], options: Options) -> None:
    """Print a table with a row for every slice and batch.

    Raises:
      InputError: a name is unknown.
    """
    strategy(options.attention)
    chips = [topology(name) for name in slices]
    jax.config.update('jax_platforms', 'cpu')
    os.environ.update(QUIET)
    plan = released_plan()
    print(f'| {" | ".join(COLUMNS)} |\n|{"---|" * len(COLUMNS)}', flush=True)
    for chip, batch in itertools.product(chips, batches):
        chosen = dataclasses.replace(options, batch=batch)
        print(f'| {" | ".join(row(chip, dict(compile_parts(chip, plan, chosen)), chosen))} |', flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    description = 'Size the sampling of teacher videos on a TPU by compiling it; needs the extra `tpu`.'
    parser = command_parser('python -m train.measure.sampler', description, EXAMPLES)
    add = parser.add_argument
    add('--topology', default='v5e:1x1', metavar='LIST', help='slices; one chip of each is used (default: %(default)s)')
    add('--batches', default='1,4', metavar='LIST', help='videos at a time on each chip (default: %(default)s)')
    add('--attention', default=ON_TPU, help='form of the attention (default: %(default)s)')
    add('--first-frame', choices=(GENERATED, PICTURE), default=GENERATED,
        help='source of unit 0: the teacher, or a given picture (default: %(default)s)')  # fmt: skip
    add('--cache', action=PathOption, default='out/aot', metavar='DIR', help='folder of results (default: %(default)s)')
    return exit_status(lambda: _run_parsed(parser.parse_args(argv)))


def _run_parsed(args: argparse.Namespace) -> None:
    batches = args.batches.split(',')
    if not all(batch.isdecimal() and int(batch) for batch in batches):
        raise InputError(f'--batches {args.batches}: write numbers from 1, separated by commas, such as 1,4.')
    options = Options(0, args.attention, int(args.first_frame == PICTURE), str(args.cache))
    run(args.topology.split(','), [int(batch) for batch in batches], options)


if __name__ == '__main__':
    sys.exit(main())
