"""JAX worker of the comparison: times this project's denoiser and distillation step, with random weights.

    python -m train.measure.against_torch.jax_worker RESULT < REQUEST

REQUEST is the JSON of a `Case`; RESULT, that of a `Measured`, is written. The step is the one that `train.dmd`
compiles.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neodragon_jax.base.compile_cache import use_compile_cache
from neodragon_jax.base.json_file import parse_json
from neodragon_jax.checkpoint.abstract import abstract_params
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.pyramid.history import envelope_history
from neodragon_jax.pyramid.stages import levels
from train.data import DTYPES
from train.data.sources import Repeated
from train.dmd.config import DMDConfig
from train.dmd.distillation import DMD
from train.dmd.teacher import MultiStepTeacher
from train.measure.against_torch.case import DENOISER, DISTILLATION, STAGES, Case, Measured
from train.runtime.program import LoopConfig
from train.runtime.sharding import MeshConfig, make_mesh
from train.runtime.step import GUARDED, Arguments, abstract_arguments, initial, jit_step, shardings_of

_SCALE = 0.02


def measure(case: Case) -> Measured:
    """Return the times of a case on the first device."""
    use_compile_cache()
    seconds, compile_s = dict[str, list[float]](), dict[str, float]()

    def time_runs(name: str, stage: int, run: Callable[[], Any]) -> None:
        compile_s[f'{name}/{stage}'], *seconds[f'{name}/{stage}'] = (_seconds(run) for _ in range(1 + case.repeats))

    program, step_of, arguments = _distillation(case)
    params = jax.jit(functools.partial(jax.tree.map, lambda leaf: leaf.astype(DTYPES[case.dtype])))(
        arguments.frozen['teacher']
    )
    for stage in case.stages:
        time_runs(DENOISER, stage, _denoiser(case, program.teacher_module, params, stage))
    del params
    carry = arguments.carry
    for stage in case.stages:
        step = step_of(stage)

        def run(step: Any = step) -> Any:
            nonlocal carry
            carry, metrics = step(carry, *arguments[1:])  # the carry is donated
            # Means over units that the batch does not hold are not finite.
            return {name: value for name, value in metrics.items() if name.endswith(GUARDED)}

        time_runs(DISTILLATION, stage, run)
    device = jax.devices()[0]
    used = device.memory_stats() or {}
    return Measured(
        device=device.device_kind,
        versions={name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'flax')},
        parameters=_count(arguments.frozen['teacher']),
        seconds=seconds,
        compile_s=compile_s,
        peak_gb=used['peak_bytes_in_use'] / 1e9 if 'peak_bytes_in_use' in used else None,
    )


def _count(params: Mapping[str, Any]) -> int:
    """Return the number of parameters, without the fixed table of positions."""
    counted = {name: tree for name, tree in params.items() if name != 'positions'}
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(counted))


def _seconds(run: Callable[[], Any]) -> float:
    """Return the time of a run until its results are computed.

    Raises:
      RuntimeError: a result is not finite.
    """
    start = time.perf_counter()
    results = jax.block_until_ready(run())
    seconds = time.perf_counter() - start
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(results)):
        raise RuntimeError('a result is not finite')
    return seconds


def _denoiser(case: Case, module: PyramidMMDiT, params: Any, stage: int) -> Callable[[], Any]:
    """Return a call of the denoiser at the last unit of every video, whose history is the longest."""
    config, key = case.config, jax.random.key(1)
    video = jax.random.normal(key, (case.batch, case.frames, case.height, case.width, config.in_channels))
    pyramid, unit = levels(video, STAGES), jnp.full(case.batch, case.frames - 1)
    clips = [*envelope_history(pyramid, unit, stage, case.frames - 1), pyramid[stage][:, -1:]]
    text = jax.random.normal(key, (case.batch, case.text_tokens, config.width))
    mask = jnp.ones((case.batch, case.text_tokens), jnp.int32)
    pooled, timestep = jax.random.normal(key, (case.batch, case.pooled)), jnp.full(case.batch, 500.0)
    apply: Any = jax.jit(module.apply)
    return lambda: apply({'params': params}, clips, text, mask, pooled, timestep)


def _distillation(case: Case) -> tuple[DMD, Callable[[int], Any], Arguments]:
    """Return the program, a function from a stage to its compiled step, and the step's arguments."""
    program, source, run = _training(case)
    abstract = abstract_arguments(program, program.frozen(), source, run, make_mesh(run.mesh))
    shardings = shardings_of(abstract)
    frozen = jax.jit(functools.partial(_random, abstract.frozen), out_shardings=shardings.frozen)(jax.random.key(0))
    batch = jax.jit(functools.partial(_random, abstract.batch), out_shardings=shardings.batch)(jax.random.key(1))
    begin = jax.jit(functools.partial(initial, program), out_shardings=shardings.carry)
    root_key = jax.device_put(jax.random.key(2), shardings.root_key)
    arguments = Arguments(begin(root_key, frozen), frozen, batch, root_key)
    return program, lambda stage: jit_step(program, stage, abstract), arguments


def _training(case: Case) -> tuple[DMD, Repeated, LoopConfig]:
    """Return the program without weights, its blank samples and the settings of its loop, on one device."""
    module, config = PyramidMMDiT(case.config), case.config
    sample = {
        'latents': np.zeros((case.frames, case.height, case.width, config.in_channels), np.float32),
        'text': np.zeros((case.text_tokens, config.width), np.float32),
        'text_mask': np.zeros(case.text_tokens, np.int32),
        'pooled': np.zeros(case.pooled, np.float32),
    }
    negative = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in sample.items()}
    options = DMDConfig(checkpoint='', dtype=case.dtype, fake_updates=case.fake_updates)
    teacher = MultiStepTeacher(module, abstract_params(module.clone(scan=True)), None, 'random')
    loop = LoopConfig(
        steps=1, batch_size=case.batch, updates=options.updates, mesh=MeshConfig(data=1, fsdp=1, tensor=1)
    )
    return DMD(options, negative, case.frames, teacher), Repeated(sample, 2**20), loop


def _random(shapes: Any, key: jax.Array) -> Any:
    """Return a tree of arrays: small normal numbers, and ones for integers."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    filled = [
        _SCALE * jax.random.normal(key, leaf.shape, leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else jnp.ones(leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, filled)


def main() -> int:
    """Answer the request on standard input."""
    case = parse_json(sys.stdin.read(), Case, 'request')
    pathlib.Path(sys.argv[1]).write_text(json.dumps(dataclasses.asdict(measure(case))))
    return 0


if __name__ == '__main__':
    sys.exit(main())
