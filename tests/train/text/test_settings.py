"""Settings of the text distillation: the published presets, and wrong values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import text as text_settings
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.config.neodragon import ContextAdapterConfig
from train import random_teacher
from train.runtime.settings import freeze
from train.text import program as text


def test_full_settings_are_the_papers():
    values = text_settings.get_config('').to_dict()
    assert freeze(text.TextConfig, values['text']) == text.TextConfig()
    assert (text.TextConfig().mse_weight, text.TextConfig().cosine_weight) == (1.0, 0.1)
    program = text.TextDistillation(text.TextConfig(), text.abstract_parts(False, 'bfloat16'))
    assert program.adapter is not None and program.adapter.config == ContextAdapterConfig()
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    frozen = program.frozen()
    assert round(count(frozen['teacher']) / 1e9, 3) == 4.762 and round(count(frozen['encoder']) / 1e9, 3) == 0.130
    with pytest.raises(InputError, match='tinny'):
        text_settings.get_config('tinny')


def test_the_random_teacher_suits_the_tiny_settings(tmp_path, monkeypatch, tiny_checkpoint):
    monkeypatch.chdir(tmp_path)
    assert random_teacher.main([]) == 0
    config = text_settings.get_config('tiny')
    encoder = tiny_checkpoint / 'text_encoder_3'
    parts = text.read_parts(str(encoder), config.embedder, config.teacher, '', 'float32')
    assert parts.embedder_params['kernel'].shape == (40, 64)


def test_outlier_channels_of_a_given_encoder(tmp_path):
    assert random_teacher.main(['--out', str(tmp_path / 'plain')]) == 0
    plain = tmp_path / 'plain' / random_teacher.TEXT_ENCODER
    options = ['--encoder', str(plain), '--outliers', '3', '--out', str(tmp_path / 'outliers')]
    assert random_teacher.main(options) == 0
    module, params = checkpoint.load(plain)
    _, scaled = checkpoint.load(tmp_path / 'outliers' / random_teacher.TEXT_ENCODER)
    inputs = jnp.arange(6).reshape(1, 6), jnp.ones((1, 6), jnp.int32)
    before, after = (np.asarray(module.apply({'params': tree}, *inputs)) for tree in (params, scaled))
    gains = np.unique(np.round(np.median(after / before, axis=(0, 1)), 3), return_counts=True)
    assert dict(zip(*gains, strict=True)) == {1.0: 37, random_teacher.OUTLIER_GAIN: 3}


@pytest.mark.parametrize(('count', 'message'), [('41', 'the states have 40 channels'), ('-1', 'give at least 0')])
def test_a_wrong_number_of_outliers_is_refused(tmp_path, capsys, count, message):
    assert random_teacher.main(['--outliers', count, '--out', str(tmp_path / 'out')]) == 2
    assert f'--outliers {count}: {message}' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'adapter': 'extends'}, "adapter is 'extends'; use one of replace, extend, none"),
        ({'encoder': 'big'}, "encoder is 'big'; use one of frozen, lora, trained"),
        ({'adapter': 'none'}, 'leaves nothing to train'),
        ({'held_out': 10, 'held_out_batch': 4}, 'held_out is 10 and held_out_batch 4'),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        freeze(text.TextConfig, changes)
