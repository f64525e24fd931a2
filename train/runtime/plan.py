"""The plan of a run as text, printed by --dry-run."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax

from neodragon_jax.base.processes import start_processes
from train.data import Source
from train.runtime import flops
from train.runtime.program import LoopConfig, Program
from train.runtime.sharding import bytes_per_device, count_parameters, describe, make_mesh, path_name, unused_devices
from train.runtime.step import STEPS_SEEN, Arguments, abstract_arguments, jit_step, shardings_of, variants


def plan(program: Program, source: Source, config: LoopConfig) -> str:
    """Return the plan of `train.runtime.loop.run`, without allocating the state: the text of --dry-run.

    It lists mesh, batches, parameters and bytes per device of each part of the state, the arithmetic of each variant of
    the step, and the sharding of every array. Every process of a run must call it.
    """
    start_processes(config.distributed, config.start_timeout_s)
    mesh = make_mesh(config.mesh)
    arguments = abstract_arguments(program, program.frozen(), source, config, mesh)
    lines = [f'{program.name}: {config.steps} steps on {mesh.size} of {jax.device_count()} devices']
    if mesh.size < jax.device_count():
        lines.append(f'warning: {unused_devices(config.mesh, jax.device_count())} Several processes refuse this mesh.')
    lines += [f'batch  {name}  {list(array.shape)}  {array.dtype}' for name, array in arguments.batch.items()]
    lines.append(f'the run reads {config.samples:,} samples; the data may hold fewer, which are then read again')
    held = {'state': arguments.carry.state, 'frozen': arguments.frozen, 'batch': arguments.batch}
    rows = [(name, tree) for name, tree in _parts(held['state'])] + [('frozen', held['frozen'])]
    width = max(len(name) for name, _ in rows)
    for name, tree in rows:
        size = bytes_per_device(tree, shardings_of(tree))
        lines.append(
            f'{name.ljust(width)}  {count_parameters(tree):>14,} numbers  {size / 2**20:>12,.2f} MiB per device'
        )
    total = sum(bytes_per_device(tree, shardings_of(tree)) for tree in held.values())
    lines.append(f'{total / 2**20:,.2f} MiB per device between steps; gradients and activations come on top')
    lines += _arithmetic(program, arguments, config.steps, mesh.size)
    return '\n'.join([*lines, describe(mesh, {'state': held['state'], 'frozen': held['frozen']})])


def _arithmetic(program: Program, arguments: Arguments, steps: int, devices: int) -> list[str]:
    """Return the lines on the arithmetic of the steps."""
    share = variants(program, min(steps, STEPS_SEEN))
    counts = {variant: _count(program, variant, arguments) for variant in share}
    lines = []
    for variant, counted in counts.items():
        once = f'; {counted.open_loops} loops of unknown length count once' if counted.open_loops else ''
        often = f'{share[variant]:.0%} of the steps'
        lines.append(f'step of variant {variant!r}  {_si(counted.total)}FLOP  {often}{once}')
    mean = sum(counts[variant].total * part for variant, part in share.items())
    lines.append(
        f'{_si(mean)}FLOP per step on average, {_si(mean / devices)}FLOP per device, {_si(mean * steps)}FLOP in all: '
        'matrix products and convolutions, loop bodies as often as they run, rematerialization included'
    )
    return lines


def _count(program: Program, variant: Hashable, arguments: Arguments) -> flops.Flops:
    """Return the arithmetic of one variant of the step by tracing it."""
    return flops.count(jit_step(program, variant, arguments).trace(*arguments).jaxpr)


def _si(number: float) -> str:
    """Return a number with three significant digits and an SI prefix: '2.09 T'."""
    for prefix in ('', 'k', 'M', 'G', 'T', 'P', 'E'):
        if abs(number) < 999.5 or prefix == 'E':
            return f'{number:.3g} {prefix}'
        number /= 1000
    raise AssertionError('the last prefix returns')


def _parts(state: Any) -> list[tuple[str, Any]]:
    """Return (name, leaves) of the fields of a state."""
    parts: dict[str, list[Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        parts.setdefault(path_name(path[:1]), []).append(leaf)
    return list(parts.items())
