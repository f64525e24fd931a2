"""Tests of the denoiser against the reference, and of the equality of its forms."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint.abstract import abstract_params
from neodragon_jax.checkpoint.names.mmdit import half_split_order
from neodragon_jax.config.neodragon import FULL, MMDiTConfig
from neodragon_jax.models.layers import sincos_table, timestep_sinusoid
from neodragon_jax.models.mmdit import PyramidMMDiT, stack_blocks, unstack_blocks
from neodragon_jax.models.modulation import modulate
from neodragon_jax.models.rotary import rotary_table
from neodragon_jax.pyramid.history import envelope_frame_ids
from neodragon_jax.pyramid.layout import attention_mask, layout_of, patchify, position_ids
from support.goldens import GOLDENS, channels_last, load_golden, relative_error
from support.mmdit import inputs, model_and_params

TOLERANCE = 2e-6  # limit of float32
# At timestep 1000, one unit in the last place of a frequency, where libraries differ, moves a sinusoid by 6e-5.
SINUSOID_TOLERANCE = 5e-6


@functools.cache
def compiled(name: str, scan: bool = False, remat: str = 'none'):
    model, params = model_and_params(name)
    if scan:
        params = stack_blocks(params, model.config.num_layers)
    model = model.clone(scan=scan, remat=remat)
    run = jax.jit(lambda params, *args: model.apply({'params': params}, *args))
    return lambda *args: run(params, *args)


def cases(name: str, golden: str = 'out') -> list[tuple[str, str]]:
    """Return the cases of a model that have a golden, as (model, case)."""
    with np.load(GOLDENS / name / 'golden.npz') as arrays:
        return [(name, key.removesuffix(f'/{golden}')) for key in arrays if key.endswith(f'/{golden}')]


@pytest.mark.parametrize(('name', 'case'), cases('dit_a') + cases('dit_b'))
def test_flow(name, case):
    golden = load_golden(name)
    want = channels_last(golden[f'{case}/out'])
    assert relative_error(compiled(name)(*inputs(golden, case)), want) < TOLERANCE


@pytest.mark.parametrize('stage', [0, 1, 2])
@pytest.mark.parametrize('name', ['dit_a', 'dit_b'])
def test_stages_packed_in_training_order(name, stage):
    golden = load_golden(name)
    clips = inputs(golden, 'packed3', f'stage{stage}_clip')[0]
    rest = [jnp.asarray(golden[f'packed3/in/{key}'][stage::3]) for key in ('text', 'text_mask', 'pooled', 'timestep')]
    got = compiled(name)(clips, *rest)
    assert relative_error(got, channels_last(golden[f'packed3/out_stage{stage}'])) < TOLERANCE


@pytest.mark.parametrize(('name', 'case'), cases('dit_a', 'inter/temb') + cases('dit_b', 'inter/temb'))
def test_intermediates(name, case):
    """Positions, rotary tables, masks and every block's output."""
    golden = load_golden(name)
    model, params = model_and_params(name)
    clips, text, text_mask, pooled, timestep = inputs(golden, case)
    layout = layout_of(clips, 2, text.shape[1])
    ids = jnp.broadcast_to(jnp.arange(len(layout.grids)), (text.shape[0], len(layout.grids)))
    want = lambda key: golden[f'{case}/inter/{key}']

    mask = attention_mask(position_ids(layout, ids), text_mask)
    np.testing.assert_array_equal(mask, want('attn_mask'))
    assert relative_error(timestep_sinusoid(timestep, 256), want('time_proj')) < SINUSOID_TOLERANCE

    def run(model: PyramidMMDiT, clips: Any, text: Any, *prompt: Any) -> Any:
        condition = model.condition(layout, ids, *prompt)
        patches = jnp.concatenate([patchify(clip, 2) for clip in clips], axis=1)
        # Keeping all image tokens, unlike a real call: the golden has the last block's output for history too.
        return condition, model.denoise(patches, text, condition, layout.image_tokens)

    spied = functools.partial(model.apply, method=run, capture_intermediates=True, mutable='intermediates')
    (condition, _), state = jax.jit(spied)({'params': params}, clips, text, text_mask, pooled, timestep)
    for table, kind, at_text in ((condition.rotary.cos, 'rope_cos', 1), (condition.rotary.sin, 'rope_sin', 0)):
        assert relative_error(table[:, :, 0], want(kind)[:, layout.text_tokens :]) < TOLERANCE
        assert np.all(want(kind)[:, : layout.text_tokens] == at_text), 'text is not rotated'
    crops = [want(f'pos_crop{i}')[0] for i in range(len(clips))]
    frames = [clip.shape[1] for clip in clips]
    rows = np.concatenate([np.tile(crop, (count, 1)) for crop, count in zip(crops, frames, strict=True)])
    assert relative_error(condition.positions, rows) < TOLERANCE

    seen: dict[str, Any] = state['intermediates']  # pyright: ignore
    temb = seen['time_embed']['__call__'][0] + seen['pooled_embed']['__call__'][0]
    assert relative_error(temb, want('temb')) < TOLERANCE
    assert relative_error(seen['patch_embed']['__call__'][0] + rows, want('patch_embed')) < TOLERANCE
    last = model.config.num_layers - 1
    for block in range(last):
        (image, words), _ = seen[f'blocks_{block}']['__call__'][0]
        assert relative_error(image, want(f'block{block}_hidden')) < TOLERANCE
        assert relative_error(words, want(f'block{block}_text')) < TOLERANCE
    (image, _), _ = seen['last_block']['__call__'][0]
    assert relative_error(image, want(f'block{last}_hidden')) < TOLERANCE
    assert relative_error(modulate(image, condition.head.gain, condition.head.shift), want('norm_out')) < TOLERANCE
    assert relative_error(seen['head']['__call__'][0], want('proj_out')) < TOLERANCE


@pytest.mark.parametrize('name', ['dit_a', 'dit_b'])
def test_tables(name):
    golden, sizes = load_golden(name), model_and_params(name)[0].config
    for got, kind in zip(rotary_table(30, sizes.attention_head_dim), ('cos', 'sin'), strict=True):
        assert relative_error(got, golden[f'unit/rope_pos0_29_{kind}']) < 1e-6
    got = timestep_sinusoid(jnp.asarray(golden['unit/timesteps']), 256)
    assert relative_error(got, golden['unit/timestep_proj256']) < SINUSOID_TOLERANCE
    assert relative_error(sincos_table(6, 16, 4).reshape(36, 16), golden['unit/sincos2d_grid6_base4_dim16']) < 1e-6


@pytest.mark.parametrize(('name', 'case'), cases('dit_a', 'out_bf16_model'))
def test_bfloat16_is_as_far_from_float32_as_the_reference(name, case):
    golden = load_golden(name)
    model, params = model_and_params(name)
    want = channels_last(golden[f'{case}/out'])
    reference = relative_error(channels_last(golden[f'{case}/out_bf16_model']), want)
    got = jax.jit(model.clone(dtype=jnp.bfloat16).apply)({'params': params}, *inputs(golden, case))
    assert 0 < relative_error(got, want) < 1.5 * reference


@pytest.mark.parametrize('remat', ['none', 'full', 'dots'])
def test_scanned_form(remat):
    golden = load_golden('dit_a')
    args = inputs(golden, 'u3_s2_b2')
    np.testing.assert_allclose(compiled('dit_a', True, remat)(*args), compiled('dit_a')(*args), atol=2e-6)


@functools.cache
def gradient(scan: bool, remat: str) -> Any:
    """Return the gradient of the mean square of a flow, in the layout of the unrolled form."""
    case = next(case for _, case in cases('dit_b') if case.startswith('u2'))
    base, params = model_and_params('dit_b')
    layers, model = base.config.num_layers, base.clone(scan=scan, remat=remat)
    loss = lambda params, *args: jnp.square(model.apply({'params': params}, *args)).mean()
    found = jax.jit(jax.grad(loss))(
        stack_blocks(params, layers) if scan else params, *inputs(load_golden('dit_b'), case)
    )
    return unstack_blocks(found, layers) if scan else found


@pytest.mark.parametrize(('scan', 'remat'), [(True, 'none'), (True, 'full'), (False, 'dots')])
def test_gradients_do_not_depend_on_form_or_remat(scan, remat):
    want, got = gradient(False, 'none'), gradient(scan, remat)
    for (path, one), two in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True):
        assert one.shape == two.shape and np.allclose(one, two, atol=1e-5), jax.tree_util.keystr(path)
    assert not np.any(want['positions']), 'the positional table is not trained'


def test_stacking_is_exact_both_ways():
    model, params = model_and_params('dit_a')
    there = stack_blocks(params, model.config.num_layers)
    assert there['blocks']['image_query']['kernel'].shape[0] == model.config.num_layers - 1
    back = unstack_blocks(there, model.config.num_layers)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, back))
    shapes = jax.eval_shape(
        lambda: model.clone(scan=True).init(jax.random.key(0), *inputs(load_golden('dit_a'), 'u0_s0_b1'))
    )
    assert jax.tree.map(jnp.shape, there) == jax.tree.map(jnp.shape, shapes['params'])


def test_padded_envelope_equals_the_unpadded_sequence():
    """The content of front padding does not affect the flow."""
    golden = load_golden('dit_a')
    clips, *rest = inputs(golden, 'u3_s2_b2')
    frames = [clip[:, i : i + 1] for clip in clips for i in range(clip.shape[1])]
    garbage = [1e3 * jnp.ones_like(frames[0])] * 3
    padded = compiled('dit_a')([*garbage, *frames], *rest, envelope_frame_ids(jnp.array([3, 3]), 6))
    assert relative_error(padded, compiled('dit_a')(clips, *rest)) < TOLERANCE


def test_rank_two_tokens_equal_a_batch_of_one():
    golden = load_golden('dit_a')
    model, params = model_and_params('dit_a')
    clips, text, text_mask, pooled, timestep = inputs(golden, 'u2_s1_b1')
    layout = layout_of(clips, 2, text.shape[1])

    def run(model: PyramidMMDiT, single: bool) -> Any:
        condition = model.condition(layout, jnp.arange(3)[None], text_mask, pooled, timestep)
        patches = jnp.concatenate([patchify(clip, 2) for clip in clips], axis=1)
        if not single:
            return model.denoise(patches, text, condition, layout.current_tokens)[0]
        squeeze = lambda tree: jax.tree.map(lambda x: x[0], tree)
        condition = condition._replace(
            blocks=squeeze(condition.blocks), last_block=squeeze(condition.last_block), head=squeeze(condition.head)
        )
        return model.denoise(patches[0], text[0], condition, layout.current_tokens)

    flow = jax.jit(functools.partial(model.apply, method=run), static_argnums=1)
    batched, single = (flow({'params': params}, one) for one in (False, True))
    np.testing.assert_allclose(single, batched, atol=2e-6)


def test_half_split_order_pairs_neighbors():
    np.testing.assert_array_equal(half_split_order(2, 4), [0, 2, 1, 3, 4, 6, 5, 7])


def test_initial_flow_is_zero():
    """Zero-initialized output layers: an untrained model predicts nothing."""
    sizes = {'num_layers': 2, 'num_attention_heads': 2, 'attention_head_dim': 8, 'caption_projection_dim': 16}
    model = PyramidMMDiT(MMDiTConfig(**sizes, pos_embed_max_size=8))
    args = [jnp.ones((1, 1, 4, 4, 16))], jnp.ones((1, 3, 16)), jnp.ones((1, 3), int), jnp.ones((1, 2048)), jnp.ones(1)
    params = jax.jit(model.init)(jax.random.key(0), *args)['params']
    assert not np.any(jax.jit(model.apply)({'params': params}, *args))
    assert np.any(params['blocks_0']['image_query']['kernel'])


def test_bad_input_is_named():
    golden = load_golden('dit_a')
    _, *rest = inputs(golden, 'u0_s0_b1')
    with pytest.raises(InputError, match='no clip'):
        compiled('dit_a')([], *rest)
    with pytest.raises(InputError, match='3x4'):
        compiled('dit_a')([jnp.zeros((1, 1, 3, 4, 16))], *rest)
    with pytest.raises(InputError, match='positional table'):
        compiled('dit_a')([jnp.zeros((1, 1, 64, 64, 16))], *rest)
    with pytest.raises(InputError, match='remat'):
        compiled('dit_a', remat='some')(*inputs(golden, 'u0_s0_b1'))


def test_full_size_is_1_5_billion_parameters():
    model = PyramidMMDiT(FULL.denoiser, scan=True)
    shapes = abstract_params(model)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) - shapes['positions'].size
    assert count == 1_512_155_200


def test_more_frames_than_positions_are_refused():
    """JAX would silently clamp their positions to the last row of the table."""
    golden = load_golden('dit_a')
    model, params = model_and_params('dit_a')
    given = [inputs(golden, case) for _, case in cases('dit_a', 'inter/temb')]
    case = max(given, key=lambda case: sum(clip.shape[1] for clip in case[0]))
    frames = sum(clip.shape[1] for clip in case[0])
    short = lambda count: model.clone(config=dataclasses.replace(model.config, max_num_frames=count))
    jax.eval_shape(short(frames).apply, {'params': params}, *case)
    with pytest.raises(InputError, match=f'{frames} latent frames; the denoiser has positions for {frames - 1}'):
        jax.eval_shape(short(frames - 1).apply, {'params': params}, *case)
