"""Operands of the attention kernel, interpreted, against norm, rotation and padding as single steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.models.operands import Form, Heads, place_normed, place_values
from support.goldens import relative_error

BATCH, HEADS, WIDTH, FEATURES, EPSILON = 2, 3, 16, 4, 1e-5
# Text, image and padded tokens: whole registers, and parts of them.
LENGTHS = [(128, 128, 256), (24, 100, 128), (0, 40, 128)]


def arrays(text: int, image: int, tokens: int, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    heads = lambda length: draw(BATCH, HEADS, WIDTH, length).astype(dtype)
    angles = draw(BATCH, 1, WIDTH // 2, image)
    scales = (None if text == 0 else 1 + draw(WIDTH) / 4), 1 + draw(WIDTH) / 4
    made = Heads(None if text == 0 else heads(text), heads(image), *scales)
    return made, (jnp.cos(angles), jnp.sin(angles), draw(BATCH, 1, FEATURES, tokens).astype(dtype))


def plain(heads: Heads, cos, sin, hides, form: Form):
    """Return the operand, step by step."""

    def normed(x, scale):
        x = x.astype(jnp.float32)
        return form.factor * scale[:, None] * x / jnp.sqrt(jnp.mean(x**2, axis=2, keepdims=True) + form.epsilon)

    image = normed(heads.image, heads.image_scale)
    first, second = image[:, :, : WIDTH // 2], image[:, :, WIDTH // 2 :]
    parts = [jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=2)]
    if heads.text is not None:
        parts.insert(0, normed(heads.text, heads.text_scale))
    joined = jnp.concatenate(parts, axis=3)
    whole = jnp.pad(joined, [(0, 0)] * 3 + [(0, form.tokens - joined.shape[3])])
    below = jnp.broadcast_to(hides, (BATCH, HEADS, *hides.shape[2:]))
    return jnp.concatenate([whole, below], axis=2).astype(heads.image.dtype)


@pytest.mark.parametrize(('text', 'image', 'tokens'), LENGTHS)
def test_operand_and_its_gradient_are_those_of_single_steps(text, image, tokens):
    heads, tables = arrays(text, image, tokens)
    form = Form(tokens, EPSILON, 0.25)
    assert relative_error(place_normed(heads, *tables, form), plain(heads, *tables, form)) < 1e-6
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, HEADS, WIDTH + FEATURES, tokens)))
    gradient = lambda make: jax.grad(lambda heads: jnp.sum(jnp.sin(make(heads, *tables, form)) * weights))(heads)
    for got, want in zip(jax.tree.leaves(gradient(place_normed)), jax.tree.leaves(gradient(plain)), strict=True):
        assert relative_error(got, want) < 2e-6


def test_bfloat16_is_rounded_once():
    """Norm and rotation are computed in float32, and only the result is rounded."""
    heads, tables = arrays(128, 100, 256, jnp.bfloat16)
    form = Form(256, EPSILON, 0.25)
    got, want = place_normed(heads, *tables, form), plain(heads, *tables, form)
    assert got.dtype == jnp.bfloat16
    # The order of the float32 operations may differ by their last bit, which moves few of the roundings.
    assert float(jnp.mean(got == want)) > 0.999


@pytest.mark.parametrize(('text', 'image', 'tokens'), LENGTHS[:2])
def test_values_are_joined_and_padded(text, image, tokens):
    heads = arrays(text, image, tokens)[0]._replace(text_scale=None, image_scale=None)
    joined = jnp.concatenate([heads.text, heads.image], axis=3)
    whole, pull_back = jax.vjp(lambda heads: place_values(heads, tokens), heads)
    assert jnp.array_equal(whole[..., : text + image], joined) and not whole[..., text + image :].any()
    change = jnp.asarray(np.random.default_rng(1).standard_normal(whole.shape), jnp.float32)
    (grads,) = pull_back(change)
    assert jnp.array_equal(grads.text, change[..., :text])
    assert jnp.array_equal(grads.image, change[..., text : text + image])
