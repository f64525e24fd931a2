"""Step distillation on the miniature checkpoint."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import dmd as dmd_settings
from support.goldens import TINY_CHECKPOINT
from support.shared import shared_folder
from train import teacher_samples
from train.dmd import program as dmd
from train.runtime import loop
from train.runtime.sharding import AXES, make_mesh, put

FRAMES, GRID, CHANNELS, BATCH = 3, 8, 16, 8


PROMPTS = ('a red ball', 'a blue cube', 'a cat')


def make_samples(folder: pathlib.Path) -> None:
    """Write 16 teacher samples to folder/samples, and what they are made of beside them."""
    (folder / 'prompts.txt').write_text('\n'.join(PROMPTS))
    write_pictures(folder / 'pictures')
    assert teacher_samples.main(sample_arguments(folder)) == 0


@pytest.fixture(scope='session')
def samples(tmp_path_factory) -> str:
    """A folder of 16 teacher samples."""
    return str(shared_folder(tmp_path_factory, 'dmd', make_samples) / 'samples')


def write_pictures(folder) -> None:
    """Write a picture per prompt."""
    folder.mkdir()
    for number, color in enumerate(('red', 'blue', 'gray')[: len(PROMPTS)]):
        Image.new('RGB', (64, 64), color).save(folder / f'{number}.png')


def sample_arguments(folder) -> list[str]:
    return [
        *('--checkpoint', str(TINY_CHECKPOINT), '--prompts-file', str(folder / 'prompts.txt')),
        *('--out', str(folder / 'samples'), '--count', '16', '--samples-per-shard', '8'),
        *('--frames', '17', '--height', '64', '--width', '64'),
        *('--steps', '1', '1', '1', '--first-steps', '1', '1', '1', '--dtype', 'float32'),
        *('--first-frame', str(folder / 'pictures')),
    ]


OPTIMIZER = {'learning_rate': 3e-3, 'epsilon': 1e-3}


OBJECTIVE = {
    'objectives': {'regression': {'weight': 10.0}},
    'teacher_steps': (1, 1, 1),
    'student': OPTIMIZER,
    'fake': OPTIMIZER,
}


# Everything at once: a critic, an average from the first step on, own histories, and batches in parts. The default
# recipe is the paper's.
WHOLE = {
    'objectives': {'regression': {'weight': 10.0}, 'adversarial': {'weight': 0.03}},
    'own_history': {'first': 0.5, 'last': 0.5, 'videos': 4},
    'average': {'decay': 0.9, 'start': 0},
    'accumulate': 2,
}
RECIPES = {'paper': {}, 'whole': WHOLE, 'gathered': WHOLE | {'gather_student': True}}


SEED = 39


def settings(
    samples: str,
    workdir='unused',
    steps: int = 1,
    mesh: tuple[int, int, int] = (8, 1, 1),
    recipe: str = 'paper',
    **changes,
):
    config = dmd_settings.get_config('tiny')
    given = {'checkpoint': str(TINY_CHECKPOINT), 'data': samples, 'workdir': str(workdir), 'seed': SEED}
    run = {'steps': steps, 'log_every': 1, 'checkpoint_every': 2, 'mesh': dict(zip(AXES, mesh, strict=True))}
    config.update(given | {'dmd': OBJECTIVE | RECIPES[recipe], 'loop': run} | changes)
    return config


@functools.cache
def placed_step(samples: str, mesh_sizes: tuple[int, int, int], recipe: str = 'paper'):
    """Return (step, function to the first carry, frozen, batch, key) of stage 2 on a mesh."""
    program, source, run = dmd.load(dmd.RECIPE.read(settings(samples, mesh=mesh_sizes, recipe=recipe)))
    mesh = make_mesh(run.mesh)
    abstract = loop.abstract_arguments(program, program.frozen(), source, run, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    frozen = put(program.frozen(), shardings.frozen)
    begin = lambda frozen: loop.Carry(
        program.init_state(jax.random.key(0), frozen), jnp.zeros((), int), jnp.zeros((), int)
    )
    carry = functools.partial(jax.jit(begin, out_shardings=shardings.carry), frozen)
    rows = [source[index] for index in range(BATCH)]
    batch = {name: np.stack([np.stack([row[name] for row in rows])] * 3) for name in abstract.batch}
    key = jax.device_put(jax.random.key(1), shardings.root_key)
    return loop.jit_step(program, 2, abstract), carry, frozen, put(batch, shardings.batch), key
