"""Measure the attention kernel on a TPU by compiling: its share of the peak rate by the compiler's final schedule.

    python -m train.measure.kernel --topology v5e:1x1,v6e:1x1

The kernel of attention `splash` is compiled alone at the last stage of the released sizes, forward and backward. The
compiler writes its schedule to a scratch folder. One step of the kernel's grid is a tile of rows times all keys; its
instructions are counted. The share is the arithmetic of 2 products forward and 5 backward / that of all matrix units in
so many cycles. `train.aot.chips` holds the shares, which estimates use. The extra `tpu` is needed.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from neodragon_jax.base.command_line import command_parser, exit_status
from neodragon_jax.config.neodragon import FULL
from neodragon_jax.models.attention import strategy
from neodragon_jax.models.splash import attend, tiles
from neodragon_jax.pyramid.history import envelope
from neodragon_jax.pyramid.layout import Layout
from train.aot.chips import Chip, Topology, topology
from train.aot.cost import ATTENTION_KERNELS
from train.aot.request import QUIET

EXAMPLES = """examples:
  the two generations whose shares train.aot holds:
    python -m train.measure.kernel --topology v5e:1x1,v6e:1x1
"""
# The last stage of the released sizes; two heads suffice, because every step of the grid is the same.
LAYOUT, HEADS = envelope(2, 6, 3, (20, 32), 128), 2
# Kernels that are measured.
FORWARD, BACKWARD = 'splash_mha_fwd', 'splash_mha_dkv'
_INSTRUCTION = re.compile(r'\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*((?:>\s*)*)')


def instructions(schedule: str) -> int:
    """Return the number of instructions in a schedule; each takes a cycle.

    Raises:
      ValueError: loops are nested, so that an instruction runs several times in a step of the grid.
    """
    depths = [match[1].count('>') for line in schedule.splitlines() if (match := _INSTRUCTION.match(line))]
    if max(depths, default=0) > 1:
        raise ValueError('a loop inside a step of the grid: instructions are not cycles')
    return len(depths)


def share(schedule: str, products: int, chip: Chip, layout: Layout = LAYOUT) -> float:
    """Return the share of the peak rate of a kernel.

    Args:
      schedule: of the compiler.
      products: matrix products of a tile of rows with all keys and the head dimension.
    """
    keys, tile = tiles(layout.tokens)
    arithmetic = products * 2 * tile * keys * FULL.denoiser.attention_head_dim
    return arithmetic / chip.flops_per_cycle / instructions(schedule)


def gradient(layout: Layout, *arrays: Any) -> Any:
    """Return the gradient of the kernel's output, so that it is compiled forward and backward.

    Args:
      arrays: queries, keys and values [1, N, K, S], position ids [1, S] and text mask [1, L].
    """

    def loss(query: Any, key: Any, value: Any, ids: Any, text_mask: Any) -> Any:
        out = attend(query, key, value, *strategy('splash').bias(layout, ids, text_mask, query.shape[1]))
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    return jax.grad(loss, argnums=(0, 1, 2))(*arrays)


def compile_kernels(slice_: Topology, folder: pathlib.Path) -> dict[str, str]:
    """Return the schedules of the kernels, forward and backward, by name.

    Args:
      folder: where the compiler writes them; it is emptied first.
    """
    for path in folder.glob('*.txt'):
        path.unlink()
    device = slice_.compile_devices()[0]
    at: Any = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
    heads = at((1, HEADS, FULL.denoiser.attention_head_dim, LAYOUT.tokens), jnp.bfloat16)
    given = heads, heads, heads, at((1, LAYOUT.tokens), jnp.int32), at((1, LAYOUT.text_tokens), jnp.int32)
    jax.jit(gradient, static_argnums=0).lower(LAYOUT, *given).compile()
    found = {}
    for name in (FORWARD, BACKWARD):
        (path,) = folder.glob(f'*-{name}*[0-9]-final_bundles.txt')
        found[name] = path.read_text()
    return found


def run(slices: Sequence[str]) -> None:
    """Print the shares on each slice.

    Raises:
      InputError: a slice is unknown.
    """
    chosen = [topology(name) for name in slices]
    jax.config.update('jax_platforms', 'cpu')
    with tempfile.TemporaryDirectory() as folder:
        dump = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*'
        # The compiler reads its flags as it is loaded, at the first topology.
        os.environ.update(QUIET | {'LIBTPU_INIT_ARGS': dump, 'TPU_LOG_DIR': folder})
        for slice_ in chosen:
            schedules = compile_kernels(slice_, pathlib.Path(folder))
            rates = [share(schedules[name], ATTENTION_KERNELS[name], slice_.chip) for name in (FORWARD, BACKWARD)]
            counts = [instructions(schedules[name]) for name in (FORWARD, BACKWARD)]
            held = ' / '.join(f'{rate:.1%}' for rate in slice_.chip.attention)
            print(
                f'{slice_.name}: forward {rates[0]:.1%} of the peak rate ({counts[0]} cycles), backward {rates[1]:.1%} '
                f'({counts[1]} cycles); train.aot uses {held}',
                flush=True,
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    description = "Measure the attention kernel on a TPU by the compiler's schedule; needs the extra `tpu`."
    parser = command_parser('python -m train.measure.kernel', description, EXAMPLES)
    default = 'v5e:1x1,v6e:1x1'
    parser.add_argument('--topology', default=default, metavar='LIST', help='slices (default: %(default)s)')
    return exit_status(lambda: _run_parsed(parser.parse_args(argv)))


def _run_parsed(args: argparse.Namespace) -> None:
    run(args.topology.split(','))


if __name__ == '__main__':
    sys.exit(main())
