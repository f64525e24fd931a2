"""Tests of text encoders and context adapter: the golden arrays, and rename tables against released names."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.neodragon import ContextAdapterConfig, T5Config
from neodragon_jax.models.clip import CLIPTextModel
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.t5 import T5EncoderWithProjection, relative_position_buckets
from support.goldens import GOLDENS, TINY_CHECKPOINT, load_golden, relative_error
from support.text_components import TOLERANCE, apply, load


def test_dt5_matches_golden():
    golden = load_golden('dt5')
    module, variables = load('dt5')
    ids, mask = jnp.asarray(golden['input_ids'], jnp.int32), jnp.asarray(golden['attention_mask'], jnp.int32)
    out, state = apply(module, variables, ids, mask, capture_intermediates=True)
    inner = state['intermediates']['encoder']
    hidden = [inner[name]['__call__'][0] for name in ('token_embedding', 'block_0', 'block_1', 'final_norm')]
    assert relative_error(out, golden['out']) < TOLERANCE
    assert relative_error(hidden[-1], golden['encoder_last_hidden']) < TOLERANCE
    for i, states in enumerate(hidden):
        assert relative_error(states[:2, :16], golden[f'hidden{i}_first2rows_first16tok']) < TOLERANCE
    bias = inner['position_bias']['__call__'][0]
    np.testing.assert_array_equal(bias[None, :, :24, :24], golden['position_bias_first24'])
    unmasked = apply(module, variables, ids[:1], jnp.ones_like(mask[:1]))
    assert relative_error(unmasked, golden['out_no_mask_row0']) < TOLERANCE
    assert relative_error(unmasked, golden['out'][:1]) > 0.01  # the mask matters in this row


def test_encode_is_the_state_before_the_projection():
    golden = load_golden('dt5')
    module, variables = load('dt5')
    # Without a batch axis, and with a boolean mask.
    ids, mask = jnp.asarray(golden['input_ids'][1], jnp.int32), jnp.asarray(golden['attention_mask'][1], bool)
    states = apply(module, variables, ids, mask, method='encode')
    assert relative_error(states, golden['encoder_last_hidden'][1]) < TOLERANCE


def test_relative_position_buckets_match_golden():
    buckets = relative_position_buckets(np.arange(-200, 201), num_buckets=32, max_distance=128)
    np.testing.assert_array_equal(buckets, load_golden('dt5')['relpos_buckets_for_-200..200'])


def test_dt5_ignores_what_padding_holds():
    golden = load_golden('dt5')
    module, variables = load('dt5')
    ids, mask = jnp.asarray(golden['input_ids'], jnp.int32), jnp.asarray(golden['attention_mask'], jnp.int32)
    other = jnp.where(mask == 1, ids, 7)
    assert bool((other != ids).any())
    valid = np.asarray(mask, bool)
    ours, others = (np.asarray(apply(module, variables, values, mask)) for values in (ids, other))
    np.testing.assert_array_equal(ours[valid], others[valid])


def test_dt5_drops_projected_features_in_training_only():
    config = T5Config(
        out_dim=64, vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.5
    )
    module = T5EncoderWithProjection(config)
    ids = jnp.arange(8)[None]
    params: Any = jax.jit(module.init)(jax.random.key(0), ids, jnp.ones_like(ids))['params']
    # With the identity as second projection, the output is the dropped hidden layer itself.
    params['projection_out']['kernel'] = jnp.eye(64)

    def run(**options):
        return np.asarray(apply(module, {'params': params}, ids, jnp.ones_like(ids), **options))

    plain, dropped = run(), run(deterministic=False, rngs={'dropout': jax.random.key(1)})
    kept = dropped[plain > 0] != 0
    assert 0.35 < kept.mean() < 0.65
    np.testing.assert_allclose(dropped[plain > 0][kept], 2 * plain[plain > 0][kept], rtol=1e-6)


def test_dt5_in_bfloat16_stays_near():
    golden = load_golden('dt5')
    module, variables = load('dt5')
    half = T5EncoderWithProjection(module.config, dtype=jnp.bfloat16)
    ids, mask = jnp.asarray(golden['input_ids'], jnp.int32), jnp.asarray(golden['attention_mask'], jnp.int32)
    out = apply(half, variables, ids, mask)
    assert out.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(out.astype(jnp.float32), golden['out']) < 0.05


def test_dt5_refuses_a_mask_of_another_shape(monkeypatch):
    # The test run's shape checks would raise first; users run without them.
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
    module, variables = load('dt5')
    with pytest.raises(InputError, match='mask has shape'):
        apply(module, variables, jnp.zeros((2, 8), jnp.int32), jnp.ones((2, 1), jnp.int32))


@pytest.mark.parametrize('name', ['ctxadapter_default', 'ctxadapter_skips_mixed'])
def test_context_adapter_matches_golden(name):
    golden = load_golden(name)
    module, variables = load(name)
    out, state = apply(module, variables, jnp.asarray(golden['in']), capture_intermediates=True)
    layer0 = state['intermediates']['layer_0']['__call__'][0]
    if not module.config.pre_activation:
        layer0 = nn.gelu(layer0, approximate=False)
    assert relative_error(layer0, golden['layer0']) < TOLERANCE
    assert relative_error(out, golden['out']) < TOLERANCE


@pytest.mark.parametrize(
    ('activation', 'expected'),
    [
        ('gelu', lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
        ('silu', lambda x: x / (1 + math.exp(-x))),
        ('relu', lambda x: max(x, 0.0)),
        ('tanh', math.tanh),
        ('linear', lambda x: x),
    ],
)
def test_context_adapter_activations(activation, expected):
    # One unit layer each side: the adapter is the activation function, or the activation of the activation.
    x = np.linspace(-3, 3, 13)[:, None]
    ones = {f'layer_{i}': {'kernel': jnp.ones((1, 1))} for i in range(2)}
    base = {'input_dims': 1, 'output_dims': 1, 'layer_depths': (1,), 'skips': (False,), 'use_biases': False}
    inside = ContextAdapter(ContextAdapterConfig(**base, activation_fn=activation))
    twice = ContextAdapter(ContextAdapterConfig(**base, activation_fn=activation, out_activation_fn=activation))
    once = np.vectorize(expected)(x)
    np.testing.assert_allclose(apply(inside, {'params': ones}, jnp.asarray(x)), once, atol=1e-6)
    np.testing.assert_allclose(apply(twice, {'params': ones}, jnp.asarray(x)), np.vectorize(expected)(once), atol=1e-6)


def test_context_adapter_starts_xavier_uniform_with_zero_bias():
    config = ContextAdapterConfig(input_dims=200, output_dims=100, layer_depths=(300,), skips=(True,))
    params: Any = ContextAdapter(config).init(jax.random.key(0), jnp.zeros((1, 200)))['params']
    for fan_in, fan_out, layer in ((200, 300, params['layer_0']), (500, 100, params['layer_1'])):
        limit = math.sqrt(6 / (fan_in + fan_out))
        assert layer['kernel'].shape == (fan_in, fan_out)
        assert 0.99 * limit < float(jnp.abs(layer['kernel']).max()) <= limit
        assert float(layer['kernel'].std()) == pytest.approx(limit / math.sqrt(3), rel=0.02)
        assert not layer['bias'].any()


def test_context_adapter_refuses_another_width():
    module, variables = load('ctxadapter_default')
    with pytest.raises(InputError, match='23 wide, the context adapter takes 24'):
        apply(module, variables, jnp.zeros((2, 23)))


@pytest.mark.parametrize('name', ['clip_1', 'clip_2'])
def test_clip_matches_golden(name):
    golden = load_golden(name)
    module, variables = load(name)
    out = apply(module, variables, jnp.asarray(golden['input_ids'], jnp.int32))
    assert relative_error(out.pooled, golden['text_embeds_pooled_projected']) < TOLERANCE
    assert relative_error(out.last_hidden_state, golden['last_hidden_state']) < TOLERANCE
    assert len(out.hidden_states) == sum(key.startswith('hidden_states_') for key in golden)
    for i, states in enumerate(out.hidden_states):
        assert relative_error(states, golden[f'hidden_states_{i}']) < TOLERANCE


@pytest.mark.parametrize('name', ['clip_1', 'clip_2'])
def test_clip_without_projection_pools_the_final_state(name):
    golden = load_golden(name)
    module, variables = load(name)
    ids = golden['input_ids']
    params = {key: value for key, value in variables['params'].items() if key != 'projection'}
    out = apply(CLIPTextModel(module.config, projection=False), {'params': params}, jnp.asarray(ids, jnp.int32))
    if module.config.eos_token_id == 2:
        end = ids.argmax(-1)
    else:
        end = np.array([list(row).index(module.config.eos_token_id) for row in ids])
    assert relative_error(out.pooled, golden['last_hidden_state'][np.arange(len(ids)), end]) < TOLERANCE


def test_clip_refuses_more_tokens_than_positions():
    module, variables = load('clip_1')
    with pytest.raises(InputError, match='21 tokens long; this tower has 20 positions'):
        apply(module, variables, jnp.zeros((1, 21), jnp.int32))


@functools.cache
def prompts_golden() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f'{TINY_CHECKPOINT.name}_golden.npz') as arrays:
        return {key: arrays[key] for key in arrays.files if key.startswith('p') and '/' in key}


def stacked(key: str) -> np.ndarray:
    return np.concatenate([prompts_golden()[f'p{i}/{key}'] for i in range(5)])


def test_tiny_checkpoint_prompt_embeddings():
    module, variables = load('tiny_checkpoint/text_encoder_3')
    ids, mask = stacked('tokenizer_3/input_ids'), stacked('tokenizer_3/attention_mask')
    out = apply(module, variables, jnp.asarray(ids, jnp.int32), jnp.asarray(mask, jnp.int32))
    assert relative_error(out, stacked('prompt_embeds')) < TOLERANCE


def test_tiny_checkpoint_pooled_is_clip_l_then_clip_g():
    parts = []
    for suffix in ('', '_2'):
        module, variables = load(f'tiny_checkpoint/text_encoder{suffix}')
        ids = jnp.asarray(stacked(f'tokenizer{suffix}/input_ids'), jnp.int32)
        parts.append(apply(module, variables, ids).pooled)
    assert relative_error(jnp.concatenate(parts, axis=-1), stacked('pooled')) < TOLERANCE


@pytest.mark.parametrize(
    ('folder', 'key'),
    [
        ('context_adapter', 'context_adapted_hybrid'),
        ('context_adapter_multistep_t2v', 'context_adapted_monolithic'),
    ],
)
def test_tiny_checkpoint_context_adapters(folder, key):
    module, variables = load(f'tiny_checkpoint/{folder}')
    for i in (0, 2):
        out = apply(module, variables, jnp.asarray(prompts_golden()[f'p{i}/prompt_embeds']))
        assert relative_error(out, prompts_golden()[f'p{i}/{key}']) < TOLERANCE
