"""Measure the rounding of bfloat16 in the difference of teacher and fake model, with and without float32 streams.

    JAX_PLATFORMS=cpu python -m train.measure.probes

Distribution matching moves the student along D - D_phi, a small difference of two large flows. Both models run at the
re-noised videos of the student, as in `train.dmd`. The fake model is a point on the line from teacher to student,
because a real one follows the student closely. For each stage the error of the difference is printed relative to the
difference in float32, and the time of the two calls.

Legend: B batch, T latent frames, h w a stage's grid, C channels.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import shipped
from neodragon_jax.checkpoint.folders import STUDENT, TEACHER
from neodragon_jax.evaluation.prompt_files import read_prompts
from neodragon_jax.generation import defaults, pipeline
from neodragon_jax.models.mmdit import PyramidMMDiT, stack_blocks
from neodragon_jax.pyramid.sampler import DrawnNoise, Plan, Prompt, sample
from neodragon_jax.pyramid.schedule import Schedule
from train.dmd.examples import Examples

EXACT = {'dtype': jnp.float32}
FORMS = {
    'bfloat16': {'dtype': jnp.bfloat16},
    'bfloat16, float32 streams': {'dtype': jnp.bfloat16, 'residual_dtype': jnp.float32},
}
STEPS, TAU, PROMPTS = (1, 1, 1), 0.375, 'evaluation_prompts.txt'
USAGE = """
examples:
  the shipped checkpoint:
    JAX_PLATFORMS=cpu python -m train.measure.probes
"""


def inputs_of_stage(latents: Array, prompt: Prompt, stage: int, schedule: Schedule) -> tuple[Any, ...]:
    """Return the arguments of both models at a stage: the last unit of every video, re-noised."""
    batch, frames = latents.shape[:2]
    examples, key = Examples(frames, 0, STEPS, STEPS, schedule), jax.random.key(stage)
    rows = {'latents': latents, 'text': prompt.text, 'text_mask': prompt.mask, 'pooled': prompt.pooled}
    draws = examples.draw(key, stage, latents.shape) | {'unit': jnp.full(batch, frames - 1)}
    example = examples.build(stage, rows, draws)
    probe = examples.probe(example.clean, stage, jnp.full(batch, TAU), draws['noise'])
    return [*example.history, probe.x], prompt.text, prompt.mask, prompt.pooled, probe.timestep


def difference(module: PyramidMMDiT, models: Sequence[Any], inputs: Any, repeats: int) -> tuple[np.ndarray, float]:
    """Return D - D_phi as float64, and the least seconds of both calls."""

    @jax.jit
    def run(models: Sequence[Any], inputs: Any) -> Array:
        first, second = (module.apply({'params': params}, *inputs).astype(jnp.float32) for params in models)  # pyright: ignore[reportAttributeAccessIssue]
        return first - second

    result, seconds = np.asarray(run(models, inputs), np.float64), []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(models, inputs))
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def measure(root: Any, share: float, batch: int, repeats: int) -> None:
    """Print the errors and times of every stage.

    Args:
      root: folder of a checkpoint with teacher, student and PROMPTS.
      share: of the way from the teacher to the student, where the fake model is.
    """
    settings, components = defaults.read(root), pipeline.load(root, 'hybrid')
    (module, teacher), (_, student) = (checkpoint.load(root / name, PyramidMMDiT) for name in (TEACHER, STUDENT))
    layers = module.config.num_layers
    teacher, student = (stack_blocks(jax.tree.map(jnp.float32, tree), layers) for tree in (teacher, student))
    models = teacher, jax.tree.map(lambda a, b: a + share * (b - a), teacher, student)
    prompt = components.encode_prompt((read_prompts(root / PROMPTS) * batch)[:batch])
    frames, height, width = 1 + (settings.frames - 1) // 8, settings.height // 8, settings.width // 8
    plan = Plan(frames, height, width, components.channels, schedule=Schedule(spacing='even'))
    noise = DrawnNoise(jax.random.split(jax.random.key(0), batch), plan.schedule)
    latents = sample(components.denoise, plan, prompt, noise).astype(jnp.float32)
    for stage in range(plan.schedule.stages):
        inputs = inputs_of_stage(latents, prompt, stage, plan.schedule)
        exact, _ = difference(module.clone(scan=True, **EXACT), models, inputs, 1)
        for name, form in FORMS.items():
            got, seconds = difference(module.clone(scan=True, **form), models, inputs, repeats)
            error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
            print(f'stage {stage}  {name:26}  error {error:.2%} of the difference  {1000 * seconds:.1f} ms')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    description = 'Measure the rounding in the difference of teacher and fake model.'
    parser = command_parser('python -m train.measure.probes', description, USAGE)
    add = parser.add_argument
    add('--checkpoint', action=PathOption, names=('hf',), metavar='DIR',
        help='root of a checkpoint with teacher and student (default: the shipped one)')  # fmt: skip
    add('--share', type=float, default=0.5, metavar='S',
        help='position of the fake model between teacher, 0, and student, 1 (default: %(default)s)')  # fmt: skip
    add('--batch', type=int, default=8, metavar='N', help='number of videos (default: %(default)s)')
    add('--repeats', type=int, default=5, metavar='N', help='timed calls, the fastest counts (default: %(default)s)')

    def run() -> None:
        args = parser.parse_args(argv)
        measure(shipped.find(args.checkpoint), args.share, args.batch, args.repeats)

    return exit_status(run)


if __name__ == '__main__':
    sys.exit(main())
