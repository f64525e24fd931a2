"""Settings of the teacher: the published preset, and wrong values."""

from __future__ import annotations

import jax
import pytest

from configs import teacher as teacher_settings
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint.abstract import abstract_params
from neodragon_jax.models.teacher import TeacherMMDiT
from train.runtime.settings import freeze
from train.teacher import program as teacher


def test_full_settings_make_the_teacher_of_the_paper(capsys):
    config = teacher_settings.get_config('')
    given = teacher.RECIPE.read(config)
    objective, run = given.teacher, given.loop
    module = teacher.TeacherTraining(objective, teacher.blank_latents(given.blank_sample, objective)[0]).module
    assert isinstance(module, TeacherMMDiT)
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(module))]
    table = module.config.pos_embed_max_size**2 * module.config.width
    assert round((sum(sizes) - table) / 1e9, 3) == 2.028
    recipe = objective.optimizer
    assert (recipe.learning_rate, recipe.warmup_steps, recipe.betas) == (5e-5, 1000, (0.9, 0.95))
    assert (recipe.weight_decay, recipe.clip_norm, run.batch_size) == (1e-4, 1.0, 256)
    with pytest.raises(InputError, match='tinny'):
        teacher_settings.get_config('tinny')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'stages': 'some'}, "stages is 'some'; use one of one, all"),
        ({'attention': 'splush'}, "attention is 'splush'; use one of auto, masked"),
        ({'caption_dropout': 1.0}, 'caption_dropout is 1.0'),
        ({'accumulate': 0}, 'accumulate is 0'),
        ({'evaluation': {'examples': 10, 'batch': 4}}, 'examples is 10 and batch 4'),
        ({'evaluation': {'samples': 65}}, 'samples is 65; choose 0 to 64'),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        freeze(teacher.TeacherConfig, changes)
