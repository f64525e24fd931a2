"""The adversarial objective on a small denoiser, against finite differences and NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.pyramid.schedule import Schedule
from support.goldens import relative_error
from support.point_world import CHANNELS, FRAMES, make_batch
from train.dmd.critic import FeatureCritic
from train.dmd.examples import Examples
from train.dmd.objectives.adversarial import Adversarial, AdversarialConfig, Critic, critic_loss
from train.dmd.objectives.objective import Models
from train.dmd.updates import Updates

ONE, STAGE = (1, 1, 1), 1
CONFIG = AdversarialConfig(weight=0.03)


@functools.cache
def world():
    """Return (critic, examples, batch with random numbers, parameters of the fake model and of the critic)."""
    sizes = MMDiTConfig(
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        in_channels=CHANNELS,
        sample_size=8,
        pos_embed_max_size=8,
    )
    module = PyramidMMDiT(sizes, scan=True)
    batch = jax.tree.map(lambda leaf: leaf[:2], make_batch())
    batch['text'] = jnp.tile(batch['text'], (1, 1, 2))
    examples = Examples(FRAMES, 1, ONE, ONE, Schedule(spacing='even'))
    shape = batch['latents'].shape
    batch |= examples.draw(jax.random.key(0), STAGE, shape)
    critic = FeatureCritic(CONFIG, module)
    example = examples.build(STAGE, batch, batch)
    inputs = ([*example.history, example.x], batch['text'], batch['text_mask'], batch['pooled'], jnp.ones(2))
    fake = jax.jit(module.init)(jax.random.key(1), *inputs)['params']
    # Modulation and head begin at zero: there every block would be the identity.
    keys = iter(jax.random.split(jax.random.key(2), 200))
    fake = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), fake)
    return critic, examples, batch, fake, jax.jit(critic.init)(jax.random.key(3))


def pull_of(z_theta):
    """Return the student's gradient, and the loss that it is the gradient of."""
    critic, examples, batch, fake, params = world()
    example, part = examples.build(STAGE, batch, batch), Adversarial(CONFIG)
    draws = part.draw(jax.random.key(5), z_theta.shape)
    logit = functools.partial(critic.logit, fake, params)
    nobody = lambda *args: pytest.fail('the adversarial objective uses only the critic')
    models = Models(student=nobody, fake=nobody, teacher=nobody, critic=logit)

    @jax.jit
    def loss(z):
        seen = logit(example, STAGE, examples.probe(z, STAGE, draws['tau'], draws['noise']))
        return jnp.sum(jnp.log1p(jnp.exp(-seen)))

    gradient = jax.jit(lambda z: part.gradient(examples, STAGE, example, z, models, draws))
    return gradient(z_theta), loss


def test_data_is_judged_behind_its_own_history():
    """Behind the student's history, the data's frame is not what follows: the critic would learn to ignore history."""
    critic, examples, batch, fake, params = world()
    own = batch | {'history': batch['latents'] + 1.0, 'own': jnp.ones(2, bool)}
    logits = []
    for rows in (batch, own):
        example = examples.build(STAGE, rows, rows)
        z_theta = 0 * example.clean
        probe = lambda z: examples.probe(z, STAGE, jnp.full(2, 0.5), jnp.zeros_like(z))
        given = (fake, params), example, STAGE, probe(z_theta), probe(example.clean), {}
        logits.append(critic.losses(*given)[2])
    plain, behind_own = logits
    np.testing.assert_allclose(behind_own['real_logit'], plain['real_logit'], rtol=1e-6)
    assert np.abs(behind_own['fake_logit'] - plain['fake_logit']).min() > 1e-3


def test_the_pull_is_the_slope_of_the_loss():
    z_theta = jax.random.normal(jax.random.key(4), (2, 1, 4, 4, CHANNELS))
    (slope, values), loss = pull_of(z_theta)
    assert np.all(np.isfinite(values['student_logit']))
    for seed in range(3):
        direction = jax.random.normal(jax.random.key(seed), z_theta.shape)
        step = 0.02
        rise = float(loss(z_theta + step * direction) - loss(z_theta - step * direction)) / (2 * step)
        assert float(jnp.sum(slope * direction)) == pytest.approx(rise, rel=0.02, abs=2e-4)


@pytest.mark.long
def test_fake_model_and_critic_learn_together_and_the_student_does_not():
    critic, examples, batch, fake, params = world()
    updates = Updates(*[critic.module.apply] * 3, examples, [], 1.0, 1.0, critic)
    batch = batch | updates.draw_fake(STAGE, batch['latents'].shape, jax.random.key(6))
    loss = lambda student, trained: updates.fake_loss(STAGE, 0, student, trained, batch)
    (value, sums), (of_student, (of_fake, of_critic)) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        fake, (fake, params)
    )
    means = {name: float(pair[0].sum() / pair[1].sum()) for name, pair in sums.items()}
    assert float(value) == pytest.approx(means['fake_mse'] + 0.03 * means['critic'], rel=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_student))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(of_critic))
    assert np.any(of_fake['patch_embed']['kernel'])


def test_critic_against_numpy():
    rng = np.random.default_rng(0)
    layers = [rng.standard_normal((2, 5, 4)) for _ in range(2)]
    network = Critic(registers=3)
    params = network.init(jax.random.key(0), layers)['params']
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape), params)
    normed = lambda x, p: (
        (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']
    )
    seen = []
    for number, tokens in enumerate(layers):
        tokens = normed(tokens, params[f'norm_{number}'])
        key = tokens @ params[f'critic_key_{number}']['kernel']
        value = tokens @ params[f'critic_value_{number}']['kernel'] + params[f'critic_value_{number}']['bias']
        scores = np.exp(np.asarray(params[f'registers_{number}'] @ np.swapaxes(key, 1, 2), np.float64) / 2)
        seen.append((scores / scores.sum(-1, keepdims=True) @ value).mean(axis=1))
    hidden = normed(np.concatenate(seen, axis=-1), params['norm'])
    hidden = hidden / (1 + np.exp(-hidden))
    want = (hidden @ params['logit']['kernel'] + params['logit']['bias'])[:, 0]
    assert relative_error(network.apply({'params': params}, [jnp.asarray(x, jnp.float32) for x in layers]), want) < 1e-4


def test_critic_loss_is_small_where_it_is_right():
    real, generated = jnp.asarray([3.0, -3.0]), jnp.asarray([-3.0, 3.0])
    want = np.log1p(np.exp(-np.asarray(real, np.float64))) + np.log1p(np.exp(np.asarray(generated, np.float64)))
    assert relative_error(critic_loss(real, generated), want) < 1e-6
