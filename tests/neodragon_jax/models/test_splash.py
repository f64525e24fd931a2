"""Tests of splash attention (interpreted, without a TPU) against scores in memory, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from neodragon_jax.base.on_mesh import jit_on_mesh
from neodragon_jax.models import attention, splash
from neodragon_jax.models.heads import QK_NORM_EPSILON, HeadOrder
from neodragon_jax.models.mmdit import REMAT_POLICIES
from neodragon_jax.models.operands import Heads
from neodragon_jax.models.rotary import make_rotary, rotate
from neodragon_jax.pyramid.history import envelope_frame_ids
from neodragon_jax.pyramid.layout import Layout, position_ids
from support.goldens import relative_error

HEADS, WIDTH, TEXT = 2, 16, 24
KINDS = ('query', 'key', 'value')
# Uneven frames; the current unit is the last.
LAYOUT = Layout(TEXT, ((2, 3), (2, 3), (4, 6), (8, 12)))
# Full history, padding frames, only the current unit; full, partial and minimal text.
UNITS, TEXTS = (3, 1, 0, 2), (24, 7, 1, 13)


# Arrays of the two streams: queries, keys and values, and the scales of the norms of queries and keys.
STREAMS = ('text', 'image')


def inputs(batch: int):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    rows = {'text': TEXT, 'image': LAYOUT.image_tokens}
    arrays = {(kind, stream): draw(batch, rows[stream], HEADS, WIDTH) for kind in KINDS for stream in STREAMS}
    arrays |= {(f'{kind}_scale', stream): 1 + draw(WIDTH) / 4 for kind in KINDS[:2] for stream in STREAMS}
    ids = position_ids(LAYOUT, envelope_frame_ids(jnp.array(UNITS[:batch]), 3))
    mask = (jnp.arange(TEXT)[None] < jnp.array(TEXTS[:batch])[:, None]).astype(jnp.int32)
    return arrays, ids, mask


def attend(name: str, arrays, ids, mask, rows: int | None):
    """Return text and image output; with `rows` only the last image rows, as in the last block."""
    strategy = attention.strategy(name)
    bias = strategy.bias(LAYOUT, ids, mask, HEADS)
    rotary = make_rotary('halves', LAYOUT, ids, 8, WIDTH, strategy.order)
    arrays = dict(arrays)
    if rows is not None:
        arrays['query', 'image'] = arrays['query', 'image'][:, -rows:]
    if strategy.order is HeadOrder.ROWS:
        return strategy.attend(*rows_of(arrays, rotary, rows), bias)
    outs = strategy.attend(
        *(lanes_of(arrays, kind, kind == 'query' and rows is not None) for kind in KINDS), rotary, bias
    )
    merge = lambda x: x.swapaxes(1, 2).reshape(*x.shape[::2], -1)
    return tuple(x if x is None else merge(x) for x in outs)


def lanes_of(arrays, kind: str, without_text: bool) -> Heads:
    text, image = (arrays[kind, stream].transpose(0, 2, 3, 1) for stream in STREAMS)
    text_scale, image_scale = (arrays.get((f'{kind}_scale', stream)) for stream in STREAMS)
    return Heads(None, image, None, image_scale) if without_text else Heads(text, image, text_scale, image_scale)


def rows_of(arrays, rotary, rows: int | None):
    """Return queries, keys and values with norm and rotation as single steps."""

    def normed(kind: str, stream: str):
        x = arrays[kind, stream]
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + QK_NORM_EPSILON)
        x = x * arrays[f'{kind}_scale', stream] * (WIDTH**-0.5 if kind == 'query' else 1)
        return rotate(x, rotary, LAYOUT.image_tokens) if stream == 'image' else x

    join = lambda of: jnp.concatenate([of(stream) for stream in STREAMS], axis=1)
    queries = attention.Queries(None if rows is not None else normed('query', 'text'), normed('query', 'image'))
    return queries, join(lambda stream: normed('key', stream)), join(lambda stream: arrays['value', stream])


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
    found, wanted = (gradient(name, arrays, ids, mask, None) for name in ('splash', 'masked'))
    for name, want in wanted.items():
        assert relative_error(found[name], want) < 5e-6, name


def test_splash_on_a_mesh_splits_samples_and_heads():
    arrays, ids, mask = inputs(batch=4)
    mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
    place = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    batch = ('data', 'fsdp')

    @jax.jit
    def on_mesh(arrays, ids, mask):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attend('splash', arrays, ids, mask, 96)[1]

    of_head = lambda array: place(array, batch, None, 'tensor') if array.ndim == 4 else place(array)
    placed = {name: of_head(array) for name, array in arrays.items()}, place(ids, batch), place(mask, batch)
    assert relative_error(on_mesh(*placed), attend('masked', arrays, ids, mask, 96)[1]) < 2e-6
    # A scale serves all samples and heads: its gradient is the sum over the devices.
    gradient = jax.jit(jax.grad(lambda arrays, ids, mask: jnp.sum(jnp.sin(on_mesh(arrays, ids, mask)))))
    found, wanted = (
        gradient(*placed),
        jax.grad(lambda a: jnp.sum(jnp.sin(attend('masked', a, ids, mask, 96)[1])))(arrays),
    )
    for name, want in wanted.items():
        assert relative_error(found[name], want) < 5e-6, name


@pytest.mark.parametrize('batch', [2, 3])
def test_samples_that_the_mesh_does_not_divide_are_computed_on_several_devices(batch):
    """A part of a batch, such as two roll-outs, may have fewer samples than the mesh has groups."""
    arrays, ids, mask = inputs(batch)
    mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
    arrays, ids, mask = jax.device_put((arrays, ids, mask), NamedSharding(mesh, PartitionSpec()))
    out = jit_on_mesh(lambda *given: attend('splash', *given, 96)[1])(arrays, ids, mask)
    assert relative_error(out, attend('masked', arrays, ids, mask, 96)[1]) < 2e-6


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
