"""Measure the attention kernel on a TPU by compiling: its share of the peak rate by the compiler's final schedule.

    python -m train.measure.kernel --topology v5e:1x1,v6e:1x1

The kernel of attention `splash` is compiled alone at the last stage of the released sizes, forward and backward. The
compiler writes its schedule to a scratch folder. One step of the kernel's grid is a tile of rows times all keys; its
instructions are counted. The share is the arithmetic of 2 products forward and 5 backward / that of all matrix units in
so many cycles. `train.aot.chips` holds the shares, which estimates use. The kernels of its operands are compared with
the time to move their bytes, which estimates take for them. The extra `tpu` is needed.
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
from neodragon_jax.models.heads import QK_NORM_EPSILON
from neodragon_jax.models.operands import NAME as OPERAND
from neodragon_jax.models.operands import Form, Heads, place_normed
from neodragon_jax.models.rotary import Rotary
from neodragon_jax.models.splash import FEATURES, attend, tiles
from neodragon_jax.pyramid.history import envelope
from neodragon_jax.pyramid.layout import Layout
from train.aot.chips import Chip, Topology, topology
from train.aot.cost import ATTENTION_KERNELS, MEMORY_BUSY
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


def gradient(layout: Layout, heads: Sequence[Heads], rotary: Rotary, ids: Any, text_mask: Any) -> Any:
    """Return the gradient of the kernel's output, so that it is compiled forward and backward.

    Args:
      heads: of queries, keys and values.
      ids, text_mask: position ids [1, S] and text mask [1, L].
    """

    def loss(heads: Sequence[Heads]) -> Any:
        queries, keys, values = heads
        hides = strategy('splash').bias(layout, ids, text_mask, HEADS)
        return jnp.sum(jnp.square(attend(queries, keys, values, rotary, hides.query, hides.key).astype(jnp.float32)))

    return jax.grad(loss)(heads)


def compile_kernels(slice_: Topology, folder: pathlib.Path) -> dict[str, str]:
    """Return the schedules of the kernels, forward and backward, by name.

    Args:
      folder: where the compiler writes them; it is emptied first.
    """
    _clear(folder)
    at = _abstract(slice_)
    normed, rotary = _inputs(at)
    heads = normed, normed, Heads(normed.text, normed.image)
    given = heads, rotary, at((1, LAYOUT.tokens), jnp.int32), at((1, LAYOUT.text_tokens), jnp.int32)
    jax.jit(gradient, static_argnums=0).lower(LAYOUT, *given).compile()
    return {name: _schedule(folder, name) for name in (FORWARD, BACKWARD)}


def compile_operands(slice_: Topology, folder: pathlib.Path) -> tuple[float, float]:
    """Return the share of the time of their bytes that the kernels of an operand compute, forward and backward.

    Args:
      folder: as in `compile_kernels`.
    """
    at, width, chip = _abstract(slice_), FULL.denoiser.attention_head_dim, slice_.chip
    tokens, features = tiles(LAYOUT.tokens)[0], FEATURES
    (heads, rotary), hides = _inputs(at), at((1, 1, features, tokens), jnp.bfloat16)
    change = at((1, HEADS, width + features, tokens), jnp.bfloat16)

    def place(heads: Heads, cos: Any, sin: Any, hides: Any) -> Any:
        return place_normed(heads, cos, sin, hides, Form(tokens, QK_NORM_EPSILON))

    def pull_back(change: Any, heads: Heads, *tables: Any) -> Any:
        return jax.vjp(lambda heads: place(heads, *tables), heads)[1](change)

    read, written = 2 * width * LAYOUT.tokens, 2 * (width + features) * tokens
    shares = []
    for function, given, moved in ((place, (), read + written), (pull_back, (change,), 2 * read + written)):
        _clear(folder)
        jax.jit(function).lower(*given, heads, *rotary, hides).compile()
        cycles = moved / (MEMORY_BUSY * chip.hbm_bytes / chip.clock)
        shares.append(instructions(_schedule(folder, OPERAND)) / cycles)
    return shares[0], shares[1]


def _abstract(slice_: Topology) -> Any:
    """Return a function that makes abstract arrays on a chip, of a shape and a type."""
    sharding = SingleDeviceSharding(slice_.compile_devices()[0])
    return lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _inputs(at: Any) -> tuple[Heads, Rotary]:
    """Return heads that are normalized, and their rotary embedding, as abstract arrays."""
    width = FULL.denoiser.attention_head_dim
    text, image = (at((1, HEADS, width, tokens), jnp.bfloat16) for tokens in (LAYOUT.text_tokens, LAYOUT.image_tokens))
    scale, table = at((width,), jnp.float32), at((1, 1, width // 2, LAYOUT.image_tokens), jnp.float32)
    return Heads(text, image, scale, scale), Rotary(table, table)


def _clear(folder: pathlib.Path) -> None:
    for path in folder.glob('*.txt'):
        path.unlink()


def _schedule(folder: pathlib.Path, name: str) -> str:
    """Return the only schedule of a kernel."""
    (path,) = folder.glob(f'*-{name}*[0-9]-final_bundles.txt')
    return path.read_text()


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
            forward, backward = compile_operands(slice_, pathlib.Path(folder))
            print(
                f'{slice_.name}: the operands are computed in {forward:.0%} of the time of their bytes, '
                f'their gradients in {backward:.0%}',
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
