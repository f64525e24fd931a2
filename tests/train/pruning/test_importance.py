"""Choosing blocks: keep lists, features, importance and the greedy choice."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.pyramid_flow import TeacherMMDiTConfig
from neodragon_jax.models.mmdit import stack_blocks, unstack_blocks
from neodragon_jax.models.teacher import TeacherMMDiT
from support.goldens import relative_error
from support.toy_denoiser import BLOCKS, CHANNELS, IDENTITY, POOLED, SIZES, TOKENS, WIDTH, denoiser
from train.pruning.features import with_features
from train.pruning.importance import Importance, block_cosines, mean_cosine
from train.pruning.importance_chart import importance_svg
from train.pruning.keep_list import check_keep, prune, read_keep
from train.pruning.selection import check_choice, choose, difference


@functools.cache
def call() -> tuple[Any, ...]:
    """Return the inputs of a call of two frames; the first is padding in the second row."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    clips = [draw(2, 1, 4, 4, CHANNELS), draw(2, 1, 4, 4, CHANNELS)]
    mask, ids = jnp.asarray([[1, 1, 1], [1, 1, 0]]), jnp.asarray([[0, 1], [-1, 0]])
    return clips, draw(2, TOKENS, WIDTH), mask, draw(2, POOLED), jnp.asarray([900.0, 300.0]), ids


@functools.cache
def observed(scan: bool, keep: tuple[int, ...] = tuple(range(BLOCKS))) -> Any:
    """Return (flow, features, cosines) of some of the blocks."""
    module, params = denoiser()
    module, params = prune(module.clone(scan=scan), stack_blocks(params, BLOCKS) if scan else params, keep)

    def run(params: Any, *inputs: Any) -> Any:
        flow, features = with_features(module)({'params': params}, *inputs)
        return flow, features, block_cosines(features)

    return jax.jit(run)(params, *call())


# --- Keep lists -------------------------------------------------------------------------------------------------------


def test_keep_lists_are_read_from_words_and_files(tmp_path):
    (tmp_path / 'keep.json').write_text(json.dumps({'keep': [0, 2, 3]}))
    assert read_keep('0,2,3') == read_keep(str(tmp_path / 'keep.json')) == (0, 2, 3)
    (tmp_path / 'other.json').write_text(json.dumps({'kept': [0]}))
    (tmp_path / 'broken.json').write_text('{')
    for text in ('0,x', '', str(tmp_path / 'other.json'), str(tmp_path / 'broken.json'), str(tmp_path / 'no.json')):
        with pytest.raises(InputError, match='keep list'):
            read_keep(text)


@pytest.mark.parametrize(
    ('keep', 'message'),
    [
        ((), 'empty'),
        ((0, 1, 2), 'the last block, 3, ends the text stream and cannot be removed'),
        ((0, 0, 3), 'every block once'),
        ((2, 1, 3), 'in the order'),
        ((0, 4), r'blocks 0\.\.3'),
        ((-1, 3), r'blocks 0\.\.3'),
    ],
)
def test_keep_lists_that_do_not_suit_are_refused(keep, message):
    with pytest.raises(InputError, match=message):
        check_keep(keep, BLOCKS)


@pytest.mark.parametrize('keep', [(0, 2, 3), (3,), (0, 1, 2, 3)])
def test_both_forms_are_pruned_alike(keep):
    module, params = denoiser()
    smaller, unrolled = prune(module, params, keep)
    _, stacked = prune(module.clone(scan=True), stack_blocks(params, BLOCKS), keep)
    assert smaller.config.num_layers == len(keep)
    again = unstack_blocks(stacked, len(keep))
    assert jax.tree.structure(again) == jax.tree.structure(unrolled)
    assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (again, unrolled)), strict=True))


def test_a_teacher_keeps_its_embedder():
    module = TeacherMMDiT(TeacherMMDiTConfig(**{**vars(SIZES), 'num_layers': 2}))
    params = {'context_embedder': {'kernel': 1}, 'denoiser': {'blocks_0': {}, 'modulators_0': {}, 'last_block': {}}}
    smaller, pruned = prune(module, params, (1,))
    assert isinstance(smaller.config, TeacherMMDiTConfig) and smaller.config.num_layers == 1
    assert pruned == {'context_embedder': {'kernel': 1}, 'denoiser': {'last_block': {}}}


# --- Features ---------------------------------------------------------------------------------------------------------


def test_features_are_the_same_scanned_and_unrolled():
    for got, want in zip(jax.tree.leaves(observed(True)), jax.tree.leaves(observed(False)), strict=True):
        assert relative_error(got, want) < 1e-5
    flow, features, _ = observed(True)
    module, params = denoiser()
    assert relative_error(flow, jax.jit(module.apply)({'params': params}, *call())) < 1e-5
    assert features.after.image.shape == (BLOCKS - 1, 2, 8, WIDTH) and features.last.shape == (2, 4, WIDTH)
    assert np.array_equal(features.image_mask, [[1] * 8, [0] * 4 + [1] * 4])
    assert np.array_equal(features.first.text, call()[1])


@pytest.mark.parametrize('scan', [True, False])
def test_a_block_that_adds_nothing_can_go(scan):
    flow, features, (image, text) = observed(scan)
    smaller_flow, smaller, _ = observed(scan, tuple(block for block in range(BLOCKS) if block != IDENTITY))
    assert relative_error(smaller_flow, flow) < 1e-6
    # The others' features are found under their new places.
    assert relative_error(smaller.after.image, np.delete(features.after.image, IDENTITY, 0)) < 1e-6
    for stream in (image, text):
        np.testing.assert_allclose(stream[IDENTITY], 1, atol=1e-6)
        assert np.max(np.delete(stream, IDENTITY, 0)) < 0.999


# --- Importance -------------------------------------------------------------------------------------------------------


def test_mean_cosine_by_hand():
    before = jnp.asarray([[[1.0, 0], [2, 0], [1, 0]]])
    after = jnp.asarray([[[1.0, 1], [-5, 0], [1, 0]]])
    assert float(mean_cosine(before, after, jnp.asarray([[1, 0, 0]]))[0]) == pytest.approx(0.5**0.5)
    assert float(mean_cosine(before, after, jnp.asarray([[1, 1, 1]]))[0]) == pytest.approx(0.5**0.5 / 3)
    assert np.isfinite(mean_cosine(0 * before, after, jnp.asarray([[0, 0, 0]]))).all()


def test_cosines_leave_padding_out():
    """The cosines of the row with a padded frame are those of the same row without it."""
    _, _, (image, text) = observed(True)
    clips, states, mask, pooled, timestep, _ = (jax.tree.map(lambda leaf: leaf[1:], part) for part in call())
    module, params = denoiser()
    inputs = (clips[1:], states, mask, pooled, timestep, jnp.zeros((1, 1), jnp.int32))
    _, features = jax.jit(lambda params: with_features(module)({'params': params}, *inputs))(params)
    for got, want in zip((image, text), block_cosines(features), strict=True):
        np.testing.assert_allclose(got[:, 1:], want, atol=1e-5)


def test_order_and_correlation_by_hand():
    scores = Importance(np.array([0.3, 0.1, 0.2, 0.0, 0.9]), np.array([0.1, 0.2, 0.3, 0.0]))
    # Ranks 3, 1, 2, 0 and 1, 2, 3, 0.
    assert scores.order() == [3, 1, 0, 2]
    found = scores.correlation()
    assert found['spearman'] == pytest.approx(0.4)
    assert found['pearson'] == pytest.approx(0.4)
    assert Importance(np.array([0.3, 0.1, 0.2]), np.array([0.1, 0.1])).correlation()['pearson'] is None
    assert json.dumps(scores.to_json())
    assert scores.table().splitlines()[4].split() == ['3', '0.0000', '0.0000', '1']
    assert 'stays' in scores.table()


def test_chart_shows_every_score():
    scores = Importance(np.array([0.3, 0.1, 0.9]), np.array([0.1, 0.2]))
    svg = importance_svg(scores, removed=[1])
    assert svg.count('<title>') == 5 and svg.count('opacity="0.3"') == 2
    import xml.etree.ElementTree

    xml.etree.ElementTree.fromstring(svg)


# --- The greedy choice ------------------------------------------------------------------------------------------------


def test_choice_is_greedy_among_the_least_important():
    scores = Importance(np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.array([0.1, 0.2, 0.3, 0.4]))
    cost, asked = {0: 5.0, 1: 1.0, 2: 2.0, 3: 0.0}, []

    def distance(keep):
        gone = set(range(5)) - set(keep)
        asked.append(gone)
        # Without 1, block 2 is missed.
        return sum(cost[block] for block in gone) + (10 if gone == {1, 2} else 0)

    rounds = choose(scores, 2, 3, distance)
    assert [each.removed for each in rounds] == [1, 0]
    assert [each.distance for each in rounds] == [1, 6]
    assert asked == [{0}, {1}, {2}, {1, 0}, {1, 2}]
    assert rounds[1].tried == {0: 6, 2: 13}


@pytest.mark.parametrize(('remove', 'candidates'), [(0, 1), (5, 5), (2, 1), (1, 5)])
def test_impossible_choices_are_refused(remove, candidates):
    with pytest.raises(InputError):
        check_choice(5, remove, candidates)


def test_difference_by_hand():
    reference = np.array([[3.0, 4.0], [1.0, 0.0]])
    assert difference(reference + np.array([[0, 1], [1, 0]]), reference) == pytest.approx((0.2 + 1) / 2)
