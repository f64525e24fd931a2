"""Students of another depth than the teacher, and low-rank updates in place of all parameters."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.models.mmdit import PyramidMMDiT, stack_blocks, unstack_blocks
from support.dmd_runs import settings
from support.goldens import TINY_CHECKPOINT, relative_error
from support.mmdit import model_and_params
from support.point_world import point_program
from train.dmd import program as dmd
from train.dmd.distillation import DMD
from train.dmd.objectives.matching import MatchingConfig
from train.dmd.objectives.progressive import ProgressiveConfig
from train.dmd.objectives.weighted import ObjectivesConfig
from train.dmd.trained import DenoiserLoraConfig, read_start
from train.pruning.keep_list import prune
from train.text.lora import merge_lora

LORA = DenoiserLoraConfig(rank=2, alpha=4.0)


def stacked():
    model, params = model_and_params('dit_a')
    return model.clone(scan=True), jax.tree.map(np.asarray, stack_blocks(params, model.config.num_layers))


def test_low_rank_updates_begin_at_the_start_bit_for_bit():
    _, start = stacked()
    trained = LORA.begin(jax.random.key(0), start)
    whole = LORA.whole(trained, start)
    assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(whole), jax.tree.leaves(start), strict=True))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (trained, start)]
    assert sizes[0] < 0.2 * sizes[1]


def test_updates_of_stacked_blocks_are_those_of_each_block():
    model, start = stacked()
    draws = iter(jax.random.split(jax.random.key(1), 100))
    moved = jax.tree.map(lambda leaf: jax.random.normal(next(draws), leaf.shape), LORA.begin(jax.random.key(0), start))
    layers = model.config.num_layers
    got = unstack_blocks(LORA.whole(moved, start), layers)
    blocks = dict(moved)
    stacked_updates = blocks.pop('blocks')
    blocks |= {f'blocks_{i}': jax.tree.map(lambda leaf, i=i: leaf[i], stacked_updates) for i in range(layers - 1)}
    want = merge_lora(unstack_blocks(start, layers), blocks, LORA.alpha / LORA.rank)
    changed = 0
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert relative_error(leaf, other) < 1e-5, path
        changed += 'kernel' in str(path[-1])
    assert changed > 8 * layers


def test_whole_models_are_copies():
    """A step donates its state; the teacher must survive."""
    start = {'a': jnp.ones(3)}
    copy = DenoiserLoraConfig().begin(jax.random.key(0), start)
    copy['a'].delete()
    assert not start['a'].is_deleted()
    assert DenoiserLoraConfig().whole(start, None) is start


@pytest.mark.long
def test_fewer_blocks_with_low_rank_updates_are_trained_and_merged(samples, tmp_path):
    """The student keeps the last of the teacher's two blocks; the result is an ordinary denoiser."""
    given = settings(samples, tmp_path / 'run', steps=2)
    given.dmd.update(keep='1', student_lora={'rank': 2}, fake_lora={'rank': 2})
    dmd.RECIPE.run(given)
    module, student = checkpoint.load(tmp_path / 'run' / 'result' / folders.STUDENT, PyramidMMDiT)
    teacher, full = checkpoint.load(TINY_CHECKPOINT / folders.TEACHER, PyramidMMDiT)
    assert (module.config.num_layers, teacher.config.num_layers) == (1, 2)
    _, start = prune(teacher, full, (1,))
    moved = {
        jax.tree_util.keystr(path)
        for (path, leaf), other in zip(
            jax.tree_util.tree_leaves_with_path(student), jax.tree.leaves(start), strict=True
        )
        if not np.array_equal(leaf, other)
    }
    assert moved and all(name.startswith("['last_block']") and name.endswith("['kernel']") for name in moved)
    record = json.loads((tmp_path / 'run' / 'result' / 'student.json').read_text())
    assert record['keep'] == [1] and record['student_lora']['rank'] == 2
    # A stored denoiser of another depth is a start as well.
    folder = tmp_path / 'run' / 'result' / folders.STUDENT
    begun = read_start(str(folder), '', teacher)
    assert begun.identity() == {'keep': [], 'start': fingerprint(folder)}
    config = dmd.DMDConfig(checkpoint=str(TINY_CHECKPOINT), dtype='float32', remat='none', start=str(folder))
    negative = {
        'text': np.zeros((4, 64), np.float32),
        'text_mask': np.ones(4, np.int32),
        'pooled': np.ones(48, np.float32),
    }
    program = DMD(config, negative, 3, start=begun)
    state = program.init_state(jax.random.key(0), program.frozen())
    assert 'blocks' not in state.student and 'blocks' in program.frozen()['teacher']
    assert np.array_equal(state.student['head']['kernel'], student['head']['kernel'])
    assert program.metadata()['start'] == fingerprint(folder)


def test_impossible_starts_are_refused():
    teacher, _ = checkpoint.load(TINY_CHECKPOINT / folders.TEACHER, PyramidMMDiT)
    with pytest.raises(InputError, match='give one of them'):
        read_start('somewhere', '1', teacher)
    with pytest.raises(InputError, match='the last block, 1, ends the text stream'):
        read_start('', '0', teacher)
    other, _ = model_and_params('dit_a')
    student = str(TINY_CHECKPOINT / folders.STUDENT)
    with pytest.raises(InputError, match=r'of the teacher .*; give a denoiser that reads'):
        read_start(student, '', other)
    with pytest.raises(InputError, match="finer is 'start', but start is ''"):
        objectives = ObjectivesConfig(MatchingConfig(weight=0.0), progressive=ProgressiveConfig(1.0, finer='start'))
        point_program(objectives=objectives)
