"""Tests of all forms of attention and of rotary matrices: the flow equals that with one mask over all scores."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.models.attention import STRATEGIES, Groups
from neodragon_jax.models.mmdit import PyramidMMDiT, stack_blocks
from neodragon_jax.models.rotary import make_rotary, rotate
from neodragon_jax.pyramid.history import envelope, envelope_frame_ids
from neodragon_jax.pyramid.layout import Layout, query_groups
from support.goldens import channels_last, load_golden, relative_error
from support.mmdit import inputs, model_and_params

TOLERANCE = 2e-6
FORMS = [('prefix', 'halves'), ('prefix_folded', 'halves'), ('prefix_folded', 'matrices'), ('splash', 'halves')]
CASE, PADDING = 'u3_s2_b2', 3


@functools.cache
def compiled_form(attention: str, rotary: str):
    model, params = model_and_params('dit_a')
    model = model.clone(attention=attention, rotary=rotary)
    run = jax.jit(lambda params, *args: model.apply({'params': params}, *args))
    return lambda *args: run(params, *args)


def padded_call(garbage: float) -> list[Any]:
    """Return a golden's inputs in an envelope three frames longer, with `garbage` in the padding."""
    clips, *rest = inputs(load_golden('dit_a'), CASE)
    frames = [clip[:, i : i + 1] for clip in clips for i in range(clip.shape[1])]
    noise = np.random.default_rng(0).standard_normal((PADDING, *frames[0].shape)).astype(np.float32)
    padding = [garbage * jnp.asarray(frame) for frame in noise]
    return [[*padding, *frames], *rest, envelope_frame_ids(jnp.array([3, 3]), 3 + PADDING)]


@pytest.mark.parametrize(('attention', 'rotary'), FORMS)
def test_flow_with_garbage_in_the_padding(attention, rotary):
    want = channels_last(load_golden('dit_a')[f'{CASE}/out'])
    run = compiled_form(attention, rotary)
    clean, dirty = (np.asarray(run(*padded_call(garbage))) for garbage in (0.0, 1e3))
    assert relative_error(clean, want) < TOLERANCE
    assert relative_error(dirty, clean) < 1e-6


@pytest.mark.parametrize(('attention', 'rotary'), FORMS)
def test_text_finds_frame_zero_wherever_it_is(attention, rotary):
    """Units 0, 1 and 2 in one envelope: frame 0 is the current unit, the last history frame, the one before."""
    clips, *rest, _ = padded_call(1.0)
    for unit in range(3):
        args = [clips, *rest, envelope_frame_ids(jnp.array([unit, unit]), 3 + PADDING)]
        want = compiled_form('masked', 'halves')(*args)
        assert relative_error(compiled_form(attention, rotary)(*args), want) < TOLERANCE


def test_text_blind_to_the_current_unit():
    """Text needs the keys of the current unit for unit 0 only."""
    model, params = model_and_params('dit_a')
    _, text, mask, pooled, timestep = inputs(load_golden('dit_a'), 'u1_s1_b1')
    patches = jnp.ones((1, 12, model.config.patch_dim))
    layout = Layout(text.shape[1], ((1, 2), (1, 2), (2, 4)))
    blind = dataclasses.replace(layout, text_sees_current=False)

    def flow(attention: str, layout: Layout, unit: int) -> Any:
        form = model.clone(attention=attention)
        ids = envelope_frame_ids(jnp.array([unit]), 2)

        def run(model: PyramidMMDiT) -> Any:
            condition = model.condition(layout, ids, mask, pooled, timestep)
            return model.denoise(patches, text, condition, layout.current_tokens)

        return jax.jit(functools.partial(form.apply, method=run))({'params': params})

    assert relative_error(flow('prefix', blind, 1), flow('masked', layout, 1)) < TOLERANCE
    assert relative_error(flow('prefix', blind, 0), flow('masked', layout, 0)) > 1e-4


@pytest.mark.parametrize(
    ('attention', 'rotary', 'remat'), [('prefix_folded', 'matrices', 'full'), ('splash', 'halves', 'kernel')]
)
def test_gradients_of_the_scanned_form(attention, rotary, remat):
    model, params = model_and_params('dit_a')
    args = padded_call(1.0)

    def gradient(model: PyramidMMDiT, params: Any) -> Any:
        return jax.jit(jax.grad(lambda p: jnp.square(model.apply({'params': p}, *args)).mean()))(params)

    stacked = stack_blocks(params, model.config.num_layers)
    want = gradient(model.clone(scan=True), stacked)
    got = gradient(model.clone(scan=True, remat=remat, attention=attention, rotary=rotary), stacked)
    for (path, one), two in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True):
        assert np.allclose(one, two, atol=1e-6), jax.tree_util.keystr(path)


def test_groups_of_the_full_size_stages():
    """Text 128; frames of 40, 160 and 640 tokens."""
    group = lambda stage: [tuple(group) for group in query_groups(envelope(stage, 6, 3, (20, 32), 128))]
    assert group(0) == [(0, 240, 6, 368), (240, 280, 1, 408)]
    assert group(1) == [(0, 200, 5, 328), (200, 360, 1, 488), (360, 520, 1, 648)]
    assert group(2) == [(0, 160, 4, 288), (160, 320, 1, 448), (320, 960, 1, 1088), (960, 1600, 1, 1728)]
    layout = envelope(2, 6, 3, (20, 32), 128)
    assert Groups.of(layout).text_keys == 1728
    assert Groups.of(dataclasses.replace(layout, text_sees_current=False)).text_keys == 1088


def test_rotary_forms_agree():
    layout = envelope(1, 3, 3, (4, 8), 5)
    assert layout.equal_run == 2
    ids = jnp.concatenate([jnp.zeros((2, 5), int), jnp.array([[-1], [4]]) + jnp.arange(4)[layout.frame_of_token]], 1)
    x = jax.random.normal(jax.random.key(0), (2, 8, 3, 16))  # the last 8 of 14 image tokens
    halves, matrices = (make_rotary(form, layout, ids, 30, 16) for form in ('halves', 'matrices'))
    assert jax.tree.leaves(matrices)[0].shape == (2, layout.image_tokens // 2, 16, 16)
    want = rotate(x, halves, layout.image_tokens)
    assert relative_error(rotate(x, matrices, layout.image_tokens), want) < 1e-6
    assert relative_error(x, want) > 0.1


def test_wrong_names_are_answered():
    args = inputs(load_golden('dit_a'), 'u0_s0_b1')
    with pytest.raises(InputError, match='Did you mean "prefix"'):
        compiled_form('prefx', 'halves')(*args)
    with pytest.raises(InputError, match='Did you mean "matrices"'):
        compiled_form('masked', 'matrixes')(*args)
    with pytest.raises(InputError, match='use "halves"'):
        compiled_form('splash', 'matrices')(*args)
    assert set(STRATEGIES) >= {'masked', 'prefix', 'prefix_folded'}
