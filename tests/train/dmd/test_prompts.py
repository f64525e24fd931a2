"""Distillation from prompts and first frames alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from support.point_world import make_batch, point, point_program
from train.dmd.evaluation import EvaluationConfig
from train.dmd.objectives.regression import RegressionConfig
from train.dmd.objectives.weighted import ObjectivesConfig
from train.dmd.own_history import OwnHistoryConfig
from train.dmd.prompt_source import PromptSource
from train.runtime.optimizer import OptimizerConfig

RATE = OptimizerConfig(learning_rate=0.01)
PROMPTS_ONLY = {
    'input': 'prompts',
    'own_history': OwnHistoryConfig(first=1.0, last=1.0),
    'objectives': ObjectivesConfig(regression=RegressionConfig(weight=0.0)),
    'student': RATE,
    'fake': RATE,
}


def test_samples_are_first_frames_followed_by_zeros():
    rows = [{'latents': np.full((count, 2, 2, 3), 7, np.float32), 'prompt': 'a'} for count in (1, 4)]
    source = PromptSource(rows, 3)  # pyright: ignore[reportArgumentType]
    assert len(source) == 2
    for sample in (source[0], source[1]):
        assert sample['latents'].shape == (3, 2, 2, 3)
        assert np.all(sample['latents'][0] == 7) and not np.any(sample['latents'][1:])
        assert sample['prompt'] == 'a'


def test_the_step_needs_no_frame_but_the_first():
    """The state after a step is the same whatever the later frames hold."""
    program = point_program(**PROMPTS_ONLY)
    state = program.init_state(jax.random.key(0), program.frozen()).replace(student=point(1), fake=point(2))
    batch = make_batch()
    batches = [batch, batch | {'latents': batch['latents'].at[:, 1:].set(0)}]
    step, results = jax.jit(functools.partial(program.train_step, 1)), []
    for rows in batches:
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * program.config.updates), rows)
        results.append(step(state, program.frozen(), stacked, jax.random.key(1)))
    (first, metrics), (second, _) = results
    assert np.array_equal(first.student['point'], second.student['point'])
    assert np.array_equal(first.fake['point'], second.fake['point'])
    assert not np.array_equal(first.student['point'], point(1)['point'])
    # There is no data to compare with.
    assert not any(name.startswith(('endpoint_mse', 'cauchy')) for name in metrics)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'protocol': '21'}, 'protocol must be "18"'),
        ({'own_history': OwnHistoryConfig(last=1.0)}, 'own_history.first and last must be 1'),
        ({'objectives': ObjectivesConfig()}, r'objectives.regression.weight must be 0'),
        ({'evaluation': EvaluationConfig(videos=4)}, r'evaluation.videos must be 0'),
    ],
)
def test_recipes_that_need_videos_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        point_program(**PROMPTS_ONLY | changes)
