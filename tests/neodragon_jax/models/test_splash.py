"""Tests of splash attention (interpreted, without a TPU) against scores in memory, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from neodragon_jax.models import attention, splash
from neodragon_jax.models.heads import LANES
from neodragon_jax.models.mmdit import REMAT_POLICIES
from neodragon_jax.pyramid.history import envelope_frame_ids
from neodragon_jax.pyramid.layout import Layout, position_ids
from support.goldens import relative_error

HEADS, WIDTH, TEXT = 2, 16, 24
# Uneven frames; the current unit is the last.
LAYOUT = Layout(TEXT, ((2, 3), (2, 3), (4, 6), (8, 12)))
# Full history, padding frames, only the current unit; full, partial and minimal text.
UNITS, TEXTS = (3, 1, 0, 2), (24, 7, 1, 13)


def inputs(batch: int):
    rng = np.random.default_rng(0)
    draw = lambda rows: jnp.asarray(rng.standard_normal((batch, rows, HEADS, WIDTH)), jnp.float32)
    ids = position_ids(LAYOUT, envelope_frame_ids(jnp.array(UNITS[:batch]), 3))
    mask = (jnp.arange(TEXT)[None] < jnp.array(TEXTS[:batch])[:, None]).astype(jnp.int32)
    return (draw(TEXT), draw(LAYOUT.image_tokens), draw(LAYOUT.tokens), draw(LAYOUT.tokens)), ids, mask


def attend(name: str, arrays, ids, mask, rows: int | None):
    """Return text and image output; with `rows` only the last image rows, as in the last block."""
    text, image, key, value = arrays
    strategy = attention.strategy(name)
    bias = strategy.bias(LAYOUT, ids, mask, HEADS)
    image = image if rows is None else image[:, -rows:]
    if strategy.order == LANES:
        text, image, key, value = (x.transpose(0, 2, 3, 1) for x in (text, image, key, value))
    outs = strategy.attend(attention.Queries(text if rows is None else None, image), key, value, bias)
    merge = lambda x: x.swapaxes(1, 2).reshape(*x.shape[::2], -1)
    return tuple(merge(x) if x is not None and strategy.order == LANES else x for x in outs)


def valid_rows(ids, mask, rows: int | None):
    """Return 1 for text and image rows that are not padding, whose outputs are compared."""
    image = (ids[:, TEXT:] >= 0)[..., None]
    return mask[..., None], image if rows is None else image[:, -rows:]


def loss(name: str, arrays, ids, mask, rows):
    outs = attend(name, arrays, ids, mask, rows)
    weights = valid_rows(ids, mask, rows)
    return sum(jnp.sum(jnp.sin(out) * weight) for out, weight in zip(outs, weights, strict=True) if out is not None)


@pytest.fixture
def small_tiles(monkeypatch):
    """Shrink the tiles to get two of rows and two of keys, as at full size."""
    monkeypatch.setattr(splash, 'LONGEST_TILE', 128)
    assert splash.tiles(LAYOUT.image_tokens) == splash.tiles(LAYOUT.tokens) == (256, 128)


@pytest.mark.parametrize('rows', [None, 96])
def test_splash_is_masked_attention(rows, small_tiles):
    arrays, ids, mask = inputs(batch=4)
    for got, want, weight in zip(
        *(attend(name, arrays, ids, mask, rows) for name in ('splash', 'masked')),
        valid_rows(ids, mask, rows),
        strict=True,
    ):
        assert (got is None) == (want is None)
        if want is not None:
            assert relative_error(got * weight, want * weight) < 2e-6
            assert bool(jnp.all(jnp.isfinite(got)))


def test_gradients_of_splash_are_those_of_masked_attention(small_tiles):
    arrays, ids, mask = inputs(batch=2)
    gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=(0, 4))
    for got, want in zip(*(gradient(name, arrays, ids, mask, None) for name in ('splash', 'masked')), strict=True):
        assert relative_error(got, want) < 5e-6


def test_splash_on_a_mesh_splits_samples_and_heads():
    arrays, ids, mask = inputs(batch=4)
    mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
    place = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))
    batch = ('data', 'fsdp')

    @jax.jit
    def on_mesh(arrays, ids, mask):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attend('splash', arrays, ids, mask, 96)[1]

    got = on_mesh(place(arrays, batch, None, 'tensor'), place(ids, batch), place(mask, batch))
    assert relative_error(got, attend('masked', arrays, ids, mask, 96)[1]) < 2e-6


def test_tiles():
    # Stage 2 of the released sizes: 1728 tokens in two tiles.
    assert splash.tiles(1600) == (1792, 896) and splash.tiles(1728) == (1792, 896)
    assert splash.tiles(408) == (512, 512) and splash.tiles(1) == (128, 128) and splash.tiles(1024) == (1024, 1024)


@pytest.mark.parametrize(('frames', 'added'), [(7, 16), (20, 32)])
def test_dimensions_that_hide(frames, added):
    """Seven frames, as released, need one group of rows; more frames, more rows."""
    layout = Layout(TEXT, ((1, 2),) * frames)
    bias = attention.strategy('splash').bias(layout, jnp.zeros((1, layout.tokens), int), jnp.ones((1, TEXT), int), 1)
    assert bias.query.shape == (1, 1, 2 + frames - 1, layout.tokens)
    assert -(-bias.query.shape[2] // splash.FEATURES) * splash.FEATURES == added


@pytest.mark.parametrize(('remat', 'kept'), [('kernel', 2), ('dots', 2), ('full', 0)])
def test_rematerialization_keeps_the_kernel_output(remat, kept, capsys):
    """Output and log-sum-exp of the kernel are residuals, so that the backward pass does not run it forward again."""
    arrays, ids, mask = inputs(batch=1)
    outs = jax.checkpoint(lambda arrays: loss('splash', arrays, ids, mask, None), policy=REMAT_POLICIES[remat])
    jax.ad_checkpoint.print_saved_residuals(outs, arrays)
    lines = [line for line in capsys.readouterr().out.splitlines() if 'argument' not in line and 'constant' not in line]
    sizes = [f'[1,{HEADS},{splash.tiles(LAYOUT.tokens)[0]}{end}]' for end in ('', f',{WIDTH}')]
    assert sum(any(size in line for size in sizes) for line in lines) == kept, lines
