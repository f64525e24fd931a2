"""Measure the denoiser's block on a TPU by compiling: seconds of one block by attention, rematerialization and stage.

    python -m train.measure.blocks --topology v5e:1x1 --attentions splash --remats full,kernel

Some blocks of the full size are scanned as in training, forward and backward, on one chip without communication. Times
are the calibrated estimate of `train.aot`. It takes a minute for each row, so a change of the block can be judged
without the compilation of a whole step. The extra `tpu` is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.config.neodragon import FULL, MMDiTConfig
from neodragon_jax.models.attention import strategy
from neodragon_jax.models.mmdit import REMAT_POLICIES, PyramidMMDiT, rotary_and_bias
from neodragon_jax.models.modulation import BlockModulation, Modulation
from neodragon_jax.pyramid.history import envelope
from neodragon_jax.pyramid.layout import Layout
from train.aot.chips import Topology, topology
from train.aot.compilation import facts_of
from train.aot.report import Case, Facts, estimate
from train.aot.request import QUIET
from train.aot.xla_flags import FLAGS
from train.runtime.model_flops import traced_flops
from train.runtime.sharding import MeshConfig, make_mesh

EXAMPLES = """examples:
  the block at full resolution on three chips:
    python -m train.measure.blocks --topology v5e:1x1,v6e:1x1,v5p:2x2x1
  what rematerialization costs at every stage:
    python -m train.measure.blocks --remats full,kernel,dots --stages 0,1,2
"""
# Patches of a full-size latent frame, text tokens, history frames and stages of the released system.
GRID, TEXT, UNITS, STAGES = (20, 32), 128, 6, 3
COLUMNS = ('topology', 'stage', 'attention', 'remat', 'ms a block', 'of it kernel', 'MFU %', 'GiB', 'compile s')


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command line; see its help."""

    blocks: int
    batch: int
    forward: bool
    cache: str


def gradient(module: PyramidMMDiT, layout: Layout, forward: bool) -> Any:
    """Return a function of the arguments of `arguments`: the squared sum of the blocks' output, or its gradients."""

    def loss(params: Any, streams: Any, modulation: Any, ids: Any, text_mask: Any) -> Any:
        run = lambda model, *given: model.blocks(*given)
        given = streams, modulation, *rotary_and_bias(module, layout, ids, text_mask), layout.image_tokens
        (image, text), _ = module.apply({'params': params}, *given, method=run)  # pyright: ignore[reportGeneralTypeIssues]
        return sum(jnp.sum(jnp.square(stream.astype(jnp.float32))) for stream in (image, text))

    def gradients(params: Any, *given: Any) -> Any:
        of_blocks = lambda blocks, *others: loss({**params, 'blocks': blocks}, *others)
        return jax.grad(of_blocks, argnums=(0, 1, 2))(params['blocks'], *given)

    return loss if forward else gradients


def arguments(config: MMDiTConfig, layout: Layout, batch: int, sharding: Any = None) -> tuple[Any, ...]:
    """Return parameters, streams, modulation, position ids and text mask of scanned blocks as abstract arrays."""
    blocks, width = config.num_layers - 1, config.width
    at: Any = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    streams = tuple(at((batch, tokens, width), jnp.bfloat16) for tokens in (layout.image_tokens, layout.text_tokens))
    vectors = Modulation(*(at((blocks, batch, 1, width), jnp.float32) for _ in Modulation._fields))
    ids = at((batch, layout.tokens), jnp.int32)
    mask = at((batch, layout.text_tokens), jnp.int32)
    # The parameters are those of any strategy.
    model = PyramidMMDiT(config, jnp.bfloat16, scan=True)
    placement = jax.eval_shape(lambda *given: rotary_and_bias(model, layout, *given), ids, mask)
    given = (streams, BlockModulation(vectors, vectors), *placement)
    run = lambda key, *given: model.init(key, *given, layout.image_tokens, method=lambda model, *a: model.blocks(*a))
    params = jax.eval_shape(run, jax.random.key(0), *given)['params']
    params = jax.tree.map(lambda leaf: at(leaf.shape, jnp.float32), params)
    return params, streams, BlockModulation(vectors, vectors), ids, mask


def compile_row(slice_: Topology, stage: int, attention: str, remat: str, options: Options) -> tuple[Case, Facts]:
    """Return the case and the facts of one combination."""
    config = dataclasses.replace(FULL.denoiser, num_layers=options.blocks + 1)
    layout = envelope(stage, UNITS, STAGES, GRID, TEXT)
    mesh = make_mesh(MeshConfig(1, 1, 1), slice_.compile_devices()[:1])
    given = arguments(config, layout, options.batch, NamedSharding(mesh, PartitionSpec()))
    make = lambda **form: PyramidMMDiT(config, jnp.bfloat16, scan=True, **form)
    start = time.perf_counter()
    lowered = jax.jit(gradient(make(attention=attention, remat=remat), layout, options.forward)).lower(*given)
    facts = facts_of(lowered, mesh, slice_, FLAGS, options.cache, time.perf_counter() - start)
    work = traced_flops(gradient(make(), layout, options.forward), *given)
    chosen = {'remat': remat, 'attention': attention}
    samples = options.batch
    return Case('blocks', str(stage), 1.0, slice_, (1, 1, 1), samples, samples, chosen, work), facts


def row(case: Case, facts: Facts, options: Options) -> list[str]:
    """Return the cells of a row, see COLUMNS."""
    cells = [case.topology.name, case.variant, case.options['attention'], case.options['remat']]
    if not facts.fits:
        return [*cells, 'does not fit', '', '', '', f'{facts.compile_s:.0f}']
    # One device of the slice computes; nothing is communicated.
    times = estimate(case, facts)
    each = 1e3 / options.blocks
    seconds = times.compute_s + times.kernels_s
    return [
        *cells,
        f'{seconds * each:.2f}',
        f'{times.kernels_s * each:.2f}',
        f'{100 * case.model_flops / (seconds * case.topology.chip.peak_flops):.1f}',
        f'{facts.needed_bytes / 2**30:.1f}',
        f'{facts.compile_s:.0f}',
    ]


def run(
    slices: Sequence[str], stages: Sequence[int], attentions: Sequence[str], remats: Sequence[str], options: Options
) -> None:
    """Print a table with a row for every combination.

    Raises:
      InputError: a name is unknown.
    """
    for name in attentions:
        strategy(name)
    for name in remats:
        if name not in ('none', *REMAT_POLICIES):
            raise InputError(f'--remats {name}: use none, {", ".join(REMAT_POLICIES)}.')
    if bad := [stage for stage in stages if stage not in range(STAGES)]:
        raise InputError(f'--stages {bad[0]}: stages are 0 to {STAGES - 1}.')
    chips = [topology(name) for name in slices]
    jax.config.update('jax_platforms', 'cpu')
    os.environ.update(QUIET)
    print(f'| {" | ".join(COLUMNS)} |\n|{"---|" * len(COLUMNS)}', flush=True)
    for chip, stage, attention, remat in itertools.product(chips, stages, attentions, remats):
        case, facts = compile_row(chip, stage, attention, remat, options)
        print(f'| {" | ".join(row(case, facts, options))} |', flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    description = "Measure the denoiser's block on a TPU by compiling it; needs the extra `tpu`."
    parser = command_parser('python -m train.measure.blocks', description, EXAMPLES)
    add = parser.add_argument
    add('--topology', default='v5e:1x1', metavar='LIST', help='slices; one chip of each is used (default: %(default)s)')
    add('--stages', default=str(STAGES - 1), metavar='LIST', help='pyramid stages (default: %(default)s)')
    add('--attentions', default='splash', metavar='LIST', help='forms of the attention (default: %(default)s)')
    add('--remats', default='full', metavar='LIST', help='rematerializations (default: %(default)s)')
    add('--blocks', type=int, default=3, metavar='N', help='blocks in the scan (default: %(default)s)')
    add('--batch', type=int, default=8, metavar='N', help='samples per chip (default: %(default)s)')
    add('--forward', action='store_true', help='forward pass only')
    add('--cache', action=PathOption, default='out/aot', metavar='DIR', help='folder of results (default: %(default)s)')
    return exit_status(lambda: _run_parsed(parser.parse_args(argv)))


def _run_parsed(args: argparse.Namespace) -> None:
    stages = args.stages.split(',')
    if not all(stage.isdecimal() for stage in stages):
        raise InputError(f'--stages {args.stages}: write numbers separated by commas, such as 0,1,2.')
    for name in ('blocks', 'batch'):
        if getattr(args, name) < 1:
            raise InputError(f'--{name} {getattr(args, name)}: give at least 1.')
    options = Options(args.blocks, args.batch, args.forward, str(args.cache))
    lists = [text.split(',') for text in (args.attentions, args.remats)]
    run(args.topology.split(','), [int(stage) for stage in stages], lists[0], lists[1], options)


if __name__ == '__main__':
    sys.exit(main())
